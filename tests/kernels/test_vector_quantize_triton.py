"""vector_quantize's Triton kernel, interpreted: the derivative of the reference, no access outside."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels.vector_quantize.reference import vector_quantize_backward_reference

from ..support.codebook_states import METRICS
from ..support.triton_tools import guarded, untouched

pytest.importorskip("triton")
from beitv2_fast.kernels.vector_quantize.triton import vector_quantize_backward_triton

pytestmark = pytest.mark.interpreted

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative: the rounding of the output


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("count", "dim"), [(100, 5), (65, 32), (3, 1), (9, 200), (0, 8)])
def test_the_gradient_agrees_with_the_reference(count, dim, dtype, metric):
    generator = torch.Generator().manual_seed(0)
    x, code, upstream = torch.randn(3, count, dim, generator=generator)
    x = x.to(dtype)
    x[:1] = 0
    loss = torch.tensor(0.5)
    gradients = [upstream, upstream[:1].expand(count, -1) if count else upstream, upstream.T.contiguous().T, None]
    for gradient in (*gradients, upstream.bfloat16()):
        for grad_loss in (loss, None):
            arguments = (gradient, grad_loss, 0.25, metric)
            if gradient is None and grad_loss is None:
                continue
            expected = vector_quantize_backward_reference(x.double(), code.double(), *arguments)
            for rows in (guarded(x), x.T.contiguous().T):
                actual = vector_quantize_backward_triton(rows, guarded(code), *arguments)
                assert actual.dtype == dtype
                # x = 0 has a gradient of 1e12 times the others': compared on its own.
                for part in (slice(0, 1), slice(1, None)):
                    a, e = actual[part].double(), expected[part]
                    limit = torch.finfo(dtype).max
                    e = torch.where(e.abs() > limit, e.sign() * torch.inf, e)
                    torch.testing.assert_close(a, e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * dim**0.5)


def test_a_column_may_lie_beyond_32_bits():
    near, other = torch.randn(2, 9, 3).half()
    far = untouched(2**31 + 9, torch.float16).as_strided((9, 3), (1, 2**30)).copy_(near)
    x = other.float()
    expected = vector_quantize_backward_triton(near, x, near, None, 1.0, "cosine")
    assert torch.equal(vector_quantize_backward_triton(far, x, near, None, 1.0, "cosine"), expected)
    assert torch.equal(vector_quantize_backward_triton(near, x, far, None, 1.0, "cosine"), expected)
