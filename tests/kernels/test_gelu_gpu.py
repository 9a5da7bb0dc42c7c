"""gelu_and_gradient on a GPU: the definition in fp64."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels import gelu_and_gradient
from beitv2_fast.kernels.gelu.reference import gelu_and_gradient_reference

from ..support.gpu import HERE, distance, pick

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 7), (pick(3000, 30), 1536)])
def test_both_results_are_those_of_fp64(shape, dtype):
    x, grad = (2 * torch.randn(2, *shape, device=HERE)).to(dtype)
    found = gelu_and_gradient(x, grad)
    for ours, exact in zip(found, gelu_and_gradient_reference(x.double(), grad.double()), strict=True):
        assert ours.dtype == dtype and ours.shape == shape and distance(ours, exact) <= TOLERANCE[dtype]
