"""The Triton kernel of gelu_and_gradient, interpreted: the definition in fp64, no access outside."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels.gelu.reference import gelu_and_gradient_reference

from ..support.triton_tools import guarded

pytest.importorskip("triton")
from beitv2_fast.kernels.gelu.triton import BLOCK, gelu_and_gradient_triton

pytestmark = pytest.mark.interpreted

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the rounding of the results


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("count", [1, 7, BLOCK, 2 * BLOCK + 3])
def test_both_results_are_those_of_fp64(count, dtype):
    x, grad = (4 * torch.randn(2, count)).to(dtype)
    found = gelu_and_gradient_triton(guarded(x), guarded(grad))
    for ours, exact in zip(found, gelu_and_gradient_reference(x.double(), grad.double()), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=TOLERANCE[dtype], atol=2e-6)


def test_infinities_and_nan_are_the_definition_s_and_stay_alone():
    x = torch.tensor([1.0, torch.nan, 1e4, -1e4, 0.0, 2.0])
    found = gelu_and_gradient_triton(x, torch.ones(6))
    torch.testing.assert_close(found, gelu_and_gradient_reference(x, torch.ones(6)), equal_nan=True)


def test_strides_are_followed():
    x, grad = torch.randn(5, 6).T, torch.ones(1).expand(6, 5)
    torch.testing.assert_close(gelu_and_gradient_triton(x, grad), gelu_and_gradient_reference(x, grad))
