"""attention: values and gradients agree with the definition in fp64 on every instruction set; what it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beitv2_fast.kernels import attention
from beitv2_fast.kernels.attention.ops import attention_backward_op, attention_op
from beitv2_fast.kernels.attention.reference import attention_reference
from beitv2_fast.kernels.native import native_ops

from ..support.counting import allocations

# Relative to the largest value of a tensor: fp32 sums over N and d; then rounding of the result to its dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}
needs_native = pytest.mark.skipif(not native_ops(), reason="the C++ ops were not compiled")


def make(B: int, N: int, H: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, N, 3, H, d, generator=generator).to(dtype)
    bias = torch.randn(1, H, N, N, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return qkv, bias, torch.randn(B, N, H, d, generator=generator).to(dtype)


def gradients(op, qkv: Tensor, bias: Tensor | None, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
    inputs = [qkv.detach().requires_grad_(), *([] if bias is None else [bias.detach().requires_grad_()])]
    out = op(inputs[0], inputs[1] if len(inputs) > 1 else None, scale)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def ours(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return attention(qkv, bias, scale=scale)


def definition(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return attention_reference(qkv, bias, scale)[0]


def assert_follows_the_definition(qkv: Tensor, bias: Tensor | None, grad: Tensor, scale: float) -> None:
    wide = [None if x is None else x.double() for x in (qkv, bias, grad)]
    expected = gradients(definition, *wide, scale)
    for name, a, b in zip(("out", "qkv", "bias"), gradients(ours, qkv, bias, grad, scale), expected, strict=False):
        tolerance = TOLERANCE[qkv.dtype] * max(b.abs().max().item(), grad.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 5),
    N=st.integers(1, 70),
    H=st.integers(1, 4),
    d=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_follows_the_definition(B, N, H, d, dtype, with_bias, seed):
    qkv, bias, grad = make(B, N, H, d, dtype, seed)
    assert_follows_the_definition(qkv, bias if with_bias else None, grad, d**-0.5)


@needs_native
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("shape", [(2, 197, 3, 64), (1, 257, 2, 80), (3, 1, 1, 1)])
def test_every_instruction_set_follows_the_definition(capability, shape):
    if capability not in torch.ops.beitv2_fast_cpu.available_capabilities():
        pytest.skip(f"this CPU has no {capability}")
    torch.ops.beitv2_fast_cpu.use_capability(capability)
    try:
        assert_follows_the_definition(*make(*shape), shape[-1] ** -0.5)
    finally:
        torch.ops.beitv2_fast_cpu.use_capability("")


def test_large_scores_neither_overflow_nor_lose_the_largest():
    qkv, bias, grad = (x.mul(10).round() for x in make(2, 30, 2, 8))  # whole numbers: fp32 scores are exact
    assert attention_reference(qkv, bias, 1.0)[1][0].max() > 500  # e^89 overflows
    assert_follows_the_definition(qkv, bias, grad, 1.0)
    assert_follows_the_definition(qkv, bias - 10_000, grad, 1.0)


def test_a_key_with_a_bias_of_minus_infinity_is_left_out():
    qkv, bias, grad = make(2, 20, 2, 8)
    bias[..., 7] = -torch.inf
    out, grad_qkv, grad_bias = gradients(ours, qkv, bias, grad, 0.3)
    expected = gradients(ours, qkv.index_select(1, torch.tensor([*range(7), *range(8, 20)])), *cut(bias, grad), 0.3)
    torch.testing.assert_close(out[:, :7], expected[0][:, :7])
    assert (grad_qkv[:, 7, 1:] == 0).all() and (grad_bias[..., 7] == 0).all()


def cut(bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Without token 7."""
    rest = torch.tensor([*range(7), *range(8, 20)])
    return bias.index_select(2, rest).index_select(3, rest), grad.index_select(1, rest)


def test_not_a_number_spreads_to_its_rows_only():
    qkv, bias, _ = make(2, 20, 2, 8)
    qkv[1, 3, 0, 1, 2] = torch.nan  # a query
    out = attention(qkv, bias)
    assert out[1, 3, 1].isnan().all() and out.isnan().sum() == 8


@needs_native
def test_the_bits_do_not_depend_on_the_number_of_threads():
    qkv, bias, grad = make(7, 50, 3, 20)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradients(ours, qkv, bias, grad, 0.2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_the_scores_of_all_images_never_exist_at_once():
    qkv, bias, grad = make(64, 197, 8, 16)
    inputs = [qkv.requires_grad_(), bias.requires_grad_()]
    scores = 64 * 8 * 197 * 197 * 4
    peak, _, _ = allocations(lambda: torch.autograd.grad(attention(*inputs), inputs, grad))
    assert peak < 0.5 * scores  # 0.08 the output, 0.24 the gradient of qkv, 0.06 the bias's in 4 groups of images


def test_no_gradient_of_the_bias_is_computed_where_none_is_wanted():
    qkv, bias, grad = make(2, 10, 2, 8)
    qkv.requires_grad_()
    expected = gradients(ours, qkv, bias, grad, 8**-0.5)[1]
    assert torch.equal(torch.autograd.grad(attention(qkv, bias), qkv, grad)[0], expected)


def test_a_bias_in_bf16_gets_a_gradient_in_bf16():
    qkv, bias, grad = make(2, 10, 2, 8)
    bias = bias.bfloat16().requires_grad_()
    attention(qkv, bias).backward(grad)
    assert bias.grad.dtype == torch.bfloat16 and bias.grad.shape == bias.shape


def test_opcheck():
    qkv, bias, grad = make(2, 9, 2, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = qkv.to(dtype)
        _, sums = attention_op(x, bias[0], 0.5)
        torch.library.opcheck(attention_op, (x.clone().requires_grad_(), bias[0].clone().requires_grad_(), 0.5))
        torch.library.opcheck(attention_op, (x.clone().requires_grad_(), None, 0.5))
        torch.library.opcheck(attention_backward_op, (grad.to(dtype), x, bias[0], None, sums, 0.5, True))


def test_it_compiles_without_a_graph_break_and_with_the_same_gradients():
    qkv, bias, grad = make(2, 9, 2, 8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, qkv, bias, grad, 0.4), gradients(ours, qkv, bias, grad, 0.4), strict=True):
        assert torch.equal(a, b)


def test_no_image_gives_no_output():
    qkv, bias, grad = make(0, 9, 2, 8)
    out, grad_qkv, grad_bias = gradients(ours, qkv, bias, grad, 0.4)
    assert out.shape == (0, 9, 2, 8) and grad_qkv.shape == qkv.shape and (grad_bias == 0).all()


@pytest.mark.parametrize(
    ("qkv", "bias", "said"),
    [
        (torch.zeros(2, 5, 2, 4), None, "qkv must be"),
        (torch.zeros(2, 5, 3, 2, 4, dtype=torch.int64), None, "floating-point"),
        (torch.zeros(2, 5, 3, 2, 4), torch.zeros(2, 2, 5, 5), "bias must be"),
        (torch.zeros(2, 5, 3, 2, 4), torch.zeros(2, 5, 4), "bias must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(qkv, bias, said):
    with pytest.raises(ValueError, match=said):
        attention(qkv, bias)
