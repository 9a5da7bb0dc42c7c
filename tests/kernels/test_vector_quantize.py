"""vector_quantize: values and gradients agree with the differentiable definition; what it keeps and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beitv2_fast.kernels import codebook_search, vector_quantize
from beitv2_fast.kernels.native import native_ops
from beitv2_fast.kernels.vector_quantize.ops import codebook_gradient, quantize, quantize_backward
from beitv2_fast.kernels.vector_quantize.reference import (
    rotate_to,
    vector_quantize_backward_reference,
    vector_quantize_reference,
)

from ..support.counting import allocations
from ..support.dispatched import Dispatched

METRICS = ["cosine", "euclidean"]
# Of the gradient, relative to its largest value: rounding of fp32 sums over D, then of the gradient to x's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def make(count: int, num_codes: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codebook = F.normalize(torch.randn(num_codes, dim, generator=generator), dim=-1)
    x = torch.randn(count, dim, generator=generator).to(dtype)
    upstream = torch.randn(count, dim, generator=generator) / max(1, count)
    return x, codebook, upstream


def run(op, x: Tensor, codebook: Tensor, upstream: Tensor | None, *weights, metric: str) -> tuple[Tensor, ...]:
    x, codebook = x.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()
    quantized, indices, loss, _ = op(x, codebook, metric, *weights)
    total = 3 * loss + ((quantized * upstream.to(quantized)).sum() if upstream is not None else 0)
    total.backward()
    return quantized.detach(), indices, loss.detach(), x.grad, codebook.grad


def ours(x, codebook, metric, commitment_weight, codebook_weight=0.0):
    return vector_quantize(
        x, codebook, metric=metric, commitment_weight=commitment_weight, codebook_weight=codebook_weight
    )


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, check_dtype=False)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    num_codes=st.integers(1, 40),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    metric=st.sampled_from(METRICS),
    codebook_weight=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_agree_with_autograd_on_the_definition(
    count, num_codes, dim, dtype, metric, codebook_weight, seed
):
    x, codebook, upstream = make(count, num_codes, dim, dtype, seed)
    actual = run(ours, x, codebook, upstream, 0.25, codebook_weight, metric=metric)
    expected = run(vector_quantize_reference, x.double(), codebook, upstream, 0.25, codebook_weight, metric=metric)
    tolerance = TOLERANCE[dtype]
    assert torch.equal(actual[1], expected[1])
    assert actual[3].dtype == dtype
    assert_near(actual[0], expected[0], 1e-6)
    torch.testing.assert_close(actual[2], expected[2], rtol=2e-6, atol=1e-7, check_dtype=False)
    # The projection takes away what lies along y: an absolute error of the size of the gradient before it.
    before = upstream.abs().max().item() + 1.5 * expected[2].item() ** 0.5 * 4 / count
    norm = x.double().norm(dim=-1).min().clamp(min=1e-3).item() if metric == "cosine" else 1.0
    torch.testing.assert_close(
        actual[3].double(), expected[3], rtol=tolerance, atol=tolerance * before / norm, check_dtype=False
    )
    if codebook_weight:
        # A sum of at most `count` differences of numbers below 1 (cosine) or about 4, each rounded to fp32.
        torch.testing.assert_close(actual[4], expected[4], rtol=1e-6, atol=1e-6 / dim, check_dtype=False)
    else:
        assert actual[4] is None


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codebook_weight", [0.0, 0.7])
def test_gradcheck_of_the_loss_in_float64(metric, codebook_weight):
    x, codebook, _ = make(7, 5, 6, torch.float64)
    inputs = (x.requires_grad_(), codebook.double().requires_grad_(codebook_weight > 0))

    def loss(x: Tensor, codebook: Tensor) -> Tensor:
        # Numerical differentiation does not stop at sg(): each weight is checked as the plain square of which it is.
        result = ours(x, codebook.detach(), metric, 0.3).loss
        return result + ours(x.detach(), codebook, metric, 0.0, codebook_weight).loss if codebook_weight else result

    def plain(x: Tensor, codebook: Tensor) -> Tensor:
        y = F.normalize(x, dim=-1) if metric == "cosine" else x
        codes = codebook[codebook_search(x, codebook, metric=metric).indices]
        return 0.3 * F.mse_loss(y, codes.detach()) + codebook_weight * F.mse_loss(y.detach(), codes)

    torch.testing.assert_close(loss(*inputs), plain(*inputs))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    for actual, expected in zip(
        torch.autograd.grad(loss(*inputs), wanted), torch.autograd.grad(plain(*inputs), wanted), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: ours(x, codebook.double(), metric, 0.3).loss, (inputs[0],))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_any_strides_and_dtype_are_taken_as_they_are(metric, dtype):
    x, codebook, upstream = make(12, 5, 20)
    quantized = codebook[codebook_search(x, codebook, metric=metric).indices]
    loss = torch.tensor(0.5)
    for gradient in (
        torch.tensor(0.5).expand(12, 20),
        upstream[:1].expand(12, -1),
        upstream.T.contiguous().T,
        upstream.repeat(1, 2)[:, ::2],
    ):
        arguments = (quantized, gradient.to(dtype), loss, 0.25, metric)
        expected = vector_quantize_backward_reference(x.double(), quantized.double(), *arguments[1:])
        assert_near(quantize_backward(x, *arguments), expected, 2e-6)
        assert_near(quantize_backward(x.T.contiguous().T, *arguments), expected, 2e-6)
        assert_near(quantize_backward(x.repeat(1, 2)[:, :20], *arguments), expected, 2e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_loss_may_be_used_alone(metric, dtype):
    x, codebook, upstream = (t.to(dtype) for t in make(12, 5, 20))
    for use in ("quantized", "loss"):
        gradients = []
        for op in (ours, vector_quantize_reference):
            leaf = x.clone().requires_grad_()
            quantized, _, loss, _ = op(leaf, codebook, metric, 0.25)
            ((quantized * upstream).sum() if use == "quantized" else loss).backward()
            gradients.append(leaf.grad)
        assert_near(gradients[0], gradients[1], 2e-6)


@pytest.mark.parametrize(("of_x", "of_codebook"), [(True, True), (True, False), (False, True)])
def test_only_gradients_that_somebody_needs_are_computed(of_x, of_codebook):
    x, codebook, _ = make(12, 5, 20)
    loss = ours(x.requires_grad_(of_x), codebook.requires_grad_(of_codebook), "cosine", 1.0, 0.7)[2]
    with Dispatched() as dispatched:
        loss.backward()
    counts = dispatched.counts
    assert counts["beitv2_fast::vector_quantize_backward"] == of_x == (x.grad is not None)
    assert counts["beitv2_fast::codebook_gradient"] == of_codebook == (codebook.grad is not None)


def test_vectors_shorter_than_eps_get_the_gradient_of_a_division_by_a_constant():
    x, codebook, upstream = make(5, 4, 20)
    x[0], x[1] = 0, 1e-16 * x[1]
    actual, expected = (
        run(op, x, codebook, upstream, 0.25, metric="cosine") for op in (ours, vector_quantize_reference)
    )
    torch.testing.assert_close(actual[3], expected[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e15, 1e30])
def test_long_and_short_vectors_neither_overflow_nor_vanish(scale):
    x, codebook, upstream = make(5, 4, 20)
    quantized = codebook[codebook_search(x, codebook).indices]
    arguments = (upstream, torch.tensor(0.5), 0.25, "cosine")
    expected = vector_quantize_backward_reference(x.double() * scale, quantized.double(), *arguments)
    actual = quantize_backward(x * scale, quantized, *arguments)
    assert_near(actual / actual.abs().max(), expected / actual.abs().max(), 2e-6)


def test_a_mutated_codebook_does_not_change_the_gradient():
    x, codebook, upstream = make(12, 5, 20)
    expected = run(ours, x, codebook, upstream, 0.25, metric="cosine")[3]
    x.requires_grad_()
    result = ours(x, codebook, "cosine", 0.25)
    codebook.normal_()  # the EMA step comes before backward
    (3 * result.loss + (result.quantized * upstream).sum()).backward()
    assert torch.equal(x.grad, expected)


def test_the_gradient_of_the_codebook_does_not_depend_on_the_order_of_the_rows():
    x, codebook, _ = make(500, 20, 16)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(5))
    gradients = [run(ours, rows, codebook, None, 0.25, 1.0, metric="euclidean")[4] for rows in (x, x[order], x.flip(0))]
    # The loss is a mean of the same numbers, its gradient a constant: the codes' sums are the same bits.
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_of_the_codebook_has_the_bits_of_the_definition_and_that_of_an_unused_code_is_zero(metric):
    x, codebook, _ = make(500, 60, 19)
    indices = codebook_search(x, codebook, metric=metric).indices % 30
    codebook[50] = torch.nan
    arguments = (x, indices, codebook, torch.tensor(0.3), 0.7, metric)
    gradient = codebook_gradient(*arguments)
    assert torch.equal(gradient, codebook_gradient._init_fn(*arguments))
    assert gradient[:30].any(-1).all()
    assert not gradient[30:].any()
    in_turn = codebook_gradient(x, indices, torch.stack([codebook, 2 * codebook]), *arguments[3:])
    alone = [
        codebook_gradient(x[g::2], indices[g::2], (g + 1) * codebook, torch.tensor(0.15), 0.7, metric) for g in (0, 1)
    ]
    torch.testing.assert_close(in_turn, torch.stack(alone))


def turned(x, codebook, metric, *weights):
    return vector_quantize(x, codebook, metric=metric, commitment_weight=weights[0], gradient="rotation")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gradient_by_rotation_agrees_with_autograd_on_the_definition(metric, dtype):
    x, codebook, upstream = make(60, 9, 20, dtype)
    codebook[:3] *= 0.1
    x[0] = 0  # no direction to rotate
    x[1:] += codebook[torch.arange(59) % 9].to(dtype)  # no vector against its code, where the plane is in doubt

    def definition(x, codebook, metric, *weights):
        return vector_quantize_reference(x, codebook, metric, *weights, gradient="rotation")

    actual = run(turned, x, codebook, upstream, 0.25, metric=metric)
    expected = run(definition, x.double(), codebook, upstream, 0.25, metric=metric)
    assert torch.equal(actual[0], codebook[actual[1]].to(actual[0].dtype))
    assert actual[3].dtype == dtype
    assert_near(actual[3][1:], expected[3][1:], 2 * TOLERANCE[dtype])
    if metric == "euclidean":
        assert_near(actual[3][0], expected[3][0], TOLERANCE[dtype])
    with pytest.raises(ValueError, match="gradient must be 'straight_through' or 'rotation'"):
        vector_quantize(x, codebook, gradient="rotated")


def test_compared_vectors_are_returned_on_request():
    x, codebook, _ = make(12, 5, 20)
    x.requires_grad_()
    result = vector_quantize(x, codebook, return_compared=True)
    assert not result.compared.requires_grad
    torch.testing.assert_close(result.compared, F.normalize(x.detach(), dim=-1))
    assert vector_quantize(x, codebook).compared is None


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_batch_has_loss_zero_and_an_empty_gradient(metric):
    x = torch.zeros(0, 4, requires_grad=True)
    result = ours(x, torch.eye(4), metric, 1.0)
    (result.loss + result.quantized.sum()).backward()
    assert result.loss == 0
    assert result.quantized.shape == x.grad.shape == (0, 4)


def test_a_vector_that_is_not_finite_makes_the_loss_nan():
    x, codebook, _ = make(12, 5, 20)
    x[3, 2] = torch.nan
    assert ours(x, codebook, "cosine", 1.0).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_of_a_zero_vector_is_that_of_normalize_which_fp16_does_not_hold(dtype):
    x, upstream = torch.zeros(1, 2, dtype=dtype, requires_grad=True), torch.tensor([[0.5, -0.25]])
    result = ours(x, torch.eye(2), "cosine", 1.0)
    (gradient,) = torch.autograd.grad(result.quantized, x, upstream.to(result.quantized.dtype))
    torch.testing.assert_close(gradient, (upstream.double() * 1e12).to(dtype))
    assert gradient.isfinite().all() == (dtype != torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_computes_in_fp32(dtype):
    x, codebook, _ = make(64, 30, 20)
    low = x.to(dtype)
    expected = ours(low.float(), codebook, "cosine", 1.0)
    with torch.autocast("cpu", dtype=dtype):
        actual = ours(low.clone().requires_grad_(), codebook, "cosine", 1.0)
    assert actual.quantized.dtype == actual.loss.dtype == torch.float32
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(actual.quantized, expected.quantized)


def test_under_autocast_a_short_vector_of_fp16_has_no_direction_to_rotate_either():
    x, upstream = torch.full((1, 4), 1e-5).half().requires_grad_(), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vector_quantize(x, torch.eye(4)[-1:], metric="euclidean", commitment_weight=0.0, gradient="rotation")
    (out.quantized * upstream).sum().backward()
    assert torch.equal(x.grad, upstream.half())


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(metric):
    x, codebook, upstream = make(12, 5, 8)
    for weight in (0.0, 0.5):
        codebook.requires_grad_(weight > 0)
        torch.library.opcheck(quantize, (x.clone().requires_grad_(), codebook, metric, 0.25, weight, True))
    quantized = ours(x, codebook.detach(), metric, 0.25).quantized
    torch.library.opcheck(quantize_backward, (x, quantized, upstream, torch.tensor(0.5), 0.25, metric))
    torch.library.opcheck(quantize_backward, (x.bfloat16(), quantized, upstream, None, 0.25, metric, "rotation"))
    indices = torch.arange(12) % 5
    torch.library.opcheck(codebook_gradient, (x, indices, codebook.detach(), torch.tensor(0.5), 0.5, metric))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_codebooks_in_turn_have_the_bits_of_each_alone(metric, dtype):
    x, codebook, upstream = make(40, 5, 8, dtype)
    codebook = torch.stack([codebook, codebook.flip(0), codebook / 2, -codebook])
    quantized, indices, loss, grad, of_codes = run(ours, x, codebook, upstream, 0.25, 0.5, metric=metric)
    alone = [run(ours, x[g::4], codebook[g], upstream[g::4], 0.25 / 4, 0.5 / 4, metric=metric) for g in range(4)]
    for g in range(4):
        for found, expected in zip((quantized, indices, grad), (*alone[g][:2], alone[g][3]), strict=True):
            assert torch.equal(found[g::4], expected)
    torch.testing.assert_close(of_codes, torch.stack([one[4] for one in alone]))
    torch.testing.assert_close(loss, torch.stack([one[2] for one in alone]).sum())


@pytest.mark.parametrize("codebook_weight", [0.0, 0.5])
def test_it_compiles_to_one_graph_with_the_same_gradients(codebook_weight):
    x, codebook, upstream = make(12, 5, 8)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = run(ours, x, codebook, upstream, 0.25, codebook_weight, metric="cosine")
    actual = run(compiled, x, codebook, upstream, 0.25, codebook_weight, metric="cosine")
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.skipif(not native_ops(), reason="the C++ ops are not compiled")
def test_memory_does_not_grow_with_vectors_times_codes():
    x, codebook, upstream = make(200_000, 256, 8)
    x.requires_grad_()

    def step() -> None:
        result = ours(x, codebook, "cosine", 0.25)
        torch.autograd.grad([result.quantized, result.loss], x, [upstream, torch.ones(())])

    step()
    # Codes, indices, distances and the gradient are 76 bytes per vector; an N x K matrix would be 1024.
    assert allocations(step)[0] < 100 * 200_000


def test_a_rotation_returns_the_target_and_the_gradient_of_its_matrix():
    x, target, upstream = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, q = F.normalize(x, dim=-1), F.normalize(target, dim=-1)
    half = F.normalize(u + q, dim=-1)
    matrix = torch.eye(5) - 2 * half[:, :, None] * half[:, None] + 2 * q[:, :, None] * u[:, None]
    matrix = matrix * (target.norm(dim=-1) / x.norm(dim=-1))[:, None, None]
    torch.testing.assert_close((matrix @ x[:, :, None]).squeeze(-1), target)
    x.requires_grad_()
    rotated = rotate_to(x, target)
    assert torch.equal(rotated, target)
    (gradient,) = torch.autograd.grad(rotated, x, upstream)
    torch.testing.assert_close(gradient, (matrix.mT @ upstream[:, :, None]).squeeze(-1))
    assert torch.equal(torch.func.grad(lambda x: (rotate_to(x, target) * upstream).sum())(x.detach()), gradient)
    assert torch.equal(torch.func.vmap(rotate_to)(x, target), target)
