"""vector_quantize on a GPU: values and gradients of the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from beitv2_fast.kernels import vector_quantize
from beitv2_fast.kernels.vector_quantize.reference import vector_quantize_reference

from ..support.codebook_states import METRICS
from ..support.gpu import HERE, autocast, distance, no_waiting, pick

pytestmark = pytest.mark.gpu
# The gradient is computed in fp32 and rounded to the dtype of x.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def problem(count: int, num_codes: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, codebook (unit codes) and a gradient from above."""
    x, codes, upstream = (torch.randn(n, dim, device=HERE) for n in (count, num_codes, count))
    return x.to(dtype), normalize(codes, dim=-1), upstream


def results(op, x: Tensor, codebook: Tensor, upstream: Tensor, metric: str, codebook_weight: float) -> list:
    """Output, loss, indices, and the gradients for x and the codebook."""
    leaves = x.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()
    if op is vector_quantize:
        options = dict(metric=metric, commitment_weight=0.25, codebook_weight=codebook_weight)
        quantized, indices, loss, _ = op(*leaves, **options)
    else:
        quantized, indices, loss, _ = op(*leaves, metric, 0.25, codebook_weight)
    (loss * 3 + (quantized * upstream).sum()).backward()
    return [quantized, loss, indices, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("codebook_weight", [0.0, 0.5])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("count", "num_codes", "dim"), [(pick(1000, 60), 50, 32), (1, 1, 1), (1, 5, 7), (70, 9, 1024)])
def test_values_and_gradients_are_the_definition_s(count, num_codes, dim, dtype, metric, codebook_weight):
    x, codebook, upstream = problem(count, num_codes, dim, dtype)
    ours = results(vector_quantize, x, codebook, upstream, metric, codebook_weight)
    exact = x.double(), codebook.double(), upstream.double()
    theirs = results(vector_quantize_reference, *exact, metric, codebook_weight)
    assert ours[0].dtype == torch.float32 and ours[3].dtype == dtype
    assert torch.equal(ours[2], theirs[2])
    if (count, dim) == (1, 1) and metric == "cosine":  # a line has no tangent: the gradient is 0
        assert ours[3].abs().max() <= 1e-6 * upstream.abs().max() / x.abs().max()
        ours[3] = theirs[3] = torch.zeros(())
    for actual, expected in zip(ours[:2] + ours[3:], theirs[:2] + theirs[3:], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert distance(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e15])
def test_long_and_short_vectors_neither_overflow_nor_vanish(scale, metric):
    x, codebook, upstream = problem(100, 20, 16)
    if metric == "euclidean":
        codebook = codebook * scale
    ours, theirs = (
        results(op, (x * scale).to(dtype), codebook.to(dtype), upstream.to(dtype), metric, 0.0)
        for op, dtype in ((vector_quantize, torch.float32), (vector_quantize_reference, torch.float64))
    )
    assert torch.equal(ours[2], theirs[2]) and distance(ours[3], theirs[3]) < 1e-5


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_any_strides_are_taken_as_they_are(metric):
    x, codebook, upstream = problem(90, 20, 24)
    expected = results(vector_quantize, x, codebook, upstream, metric, 0.0)
    for layout in (upstream.T.contiguous().T, torch.cat([upstream, upstream], 1)[:, :24]):
        wide = torch.cat([x, x], 1)[:, 24:]
        ours = results(vector_quantize, wide, codebook.T.contiguous().T, layout, metric, 0.0)
        assert torch.equal(ours[3], expected[3])
    leaf = x.clone().requires_grad_()
    vector_quantize(leaf, codebook, metric=metric).quantized.sum().backward()  # a gradient of stride 0
    (dense,) = torch.autograd.grad(vector_quantize(leaf, codebook, metric=metric).quantized, leaf, torch.ones_like(x))
    assert torch.equal(leaf.grad, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_it_computes_in_fp32(dtype):
    x, codebook, _ = problem(200, 30, 32)
    plain = vector_quantize(x, codebook)
    with autocast(dtype):
        inside = vector_quantize(x, codebook)
    assert inside.quantized.dtype == torch.float32
    assert torch.equal(inside.quantized, plain.quantized) and torch.equal(inside.loss, plain.loss)


@pytest.mark.parametrize("metric", METRICS)
def test_no_vectors_are_loss_0_and_a_nan_vector_is_a_nan_loss(metric):
    x, codebook, upstream = problem(0, 9, 5)
    out = results(vector_quantize, x, codebook, upstream, metric, 0.5)
    assert out[1] == 0 and out[3].shape == (0, 5) and (out[4] == 0).all()
    x, codebook, upstream = problem(4, 9, 5)
    x[2, 3] = torch.nan
    out = results(vector_quantize, x, codebook, upstream, metric, 0.0)
    assert out[1].isnan() and out[3][[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_codebook_may_move_before_backward(metric):
    x, codebook, upstream = problem(50, 9, 5)
    expected = results(vector_quantize, x, codebook, upstream, metric, 0.0)[3]
    leaf = x.clone().requires_grad_()
    out = vector_quantize(leaf, codebook, metric=metric, commitment_weight=0.25)
    codebook.add_(1)
    (out.loss * 3 + (out.quantized * upstream).sum()).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_the_host_waits_for_nothing(metric):
    arguments = *problem(300, 50, 32), metric, 0.5
    expected = results(vector_quantize, *arguments)
    with no_waiting():
        again = results(vector_quantize, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
