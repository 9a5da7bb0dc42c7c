"""The Triton kernels of attention, interpreted, against the definition in float64; behind guard pages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from beitv2_fast.kernels import attention
from beitv2_fast.kernels.attention import ops
from beitv2_fast.kernels.attention.reference import attention_backward_reference, attention_reference

from ..support.triton_tools import guarded

pytest.importorskip("triton")
from beitv2_fast.kernels.attention import triton as gpu
from beitv2_fast.kernels.attention.triton import Blocks, Plan, attention_backward_triton, attention_triton

pytestmark = pytest.mark.interpreted

BF16, FP16 = torch.bfloat16, torch.float16
# Relative to the largest value: operands of every product (bias, p and ds among them) are rounded to the dtype.
TOLERANCE = {FP16: 2e-3, BF16: 1.5e-2}
Problem = tuple[Tensor, Tensor, Tensor]


def problem(B: int, N: int, H: int, d: int, dtype: torch.dtype) -> Problem:
    """qkv, bias and a gradient from above, each ending where a page ends that no one may touch."""
    generator = torch.Generator().manual_seed(B + N + H + d)
    shapes = (B, N, 3, H, d), (H, N, N), (B, N, H, d)
    qkv, bias, grad = (torch.randn(*shape, generator=generator) for shape in shapes)
    return guarded(qkv.to(dtype)), guarded(bias), guarded(grad.to(dtype))


def ours(qkv: Tensor, bias: Tensor | None, grad: Tensor, scale: float, of_bias: bool = True) -> list[Tensor]:
    out, lse = attention_triton(qkv, bias, scale)
    gradients = attention_backward_triton(grad, qkv, bias, out, lse, scale, of_bias and bias is not None)
    return [out, lse, *gradients]


def exact(qkv: Tensor, bias: Tensor | None, grad: Tensor, scale: float) -> list[Tensor]:
    """As ours: out, lse in powers of 2, gradients."""
    qkv, grad = qkv.double(), grad.double()
    bias = None if bias is None else bias.double()
    out, (largest, inverse) = attention_reference(qkv, bias, scale)
    gradients = attention_backward_reference(grad, qkv, bias, scale)
    return [out, (largest - inverse.log()) / math.log(2), *gradients]


def assert_close(a: Tensor, b: Tensor, dtype: torch.dtype, floor: float = 0.0) -> None:
    assert a.shape == b.shape
    assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(b.abs().max().item(), floor)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("B", "N", "H", "d"),
    [
        (1, 1, 1, 1), (3, 17, 2, 32), (2, 65, 2, 64), (2, 197, 1, 64), (1, 64, 1, 16), (1, 209, 1, 64), (1, 33, 1, 80),
    ],
)  # fmt: skip
def test_values_and_gradients_are_the_definition_s(B, N, H, d, dtype):
    qkv, bias, grad = problem(B, N, H, d, dtype)
    found, expected = ours(qkv, bias, grad, d**-0.5), exact(qkv, bias, grad, d**-0.5)
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, torch.float32]
    assert found[2].is_contiguous() and found[3].is_contiguous()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, dtype, floor=1.0 if N == 1 else 0.0)  # one token has no gradient of q, k and the bias


@pytest.fixture(params=["short", "long"])
def plan(request, monkeypatch):
    """Few tokens by the plan for few, and by the one for many."""
    if request.param == "long":
        monkeypatch.setitem(gpu.PLANS, "interpreter", gpu.PLANS["sm_90"][2:])


def test_without_a_bias_and_without_its_gradient(plan):
    qkv, bias, grad = problem(2, 65, 2, 32, FP16)
    scale = 0.2
    none, expected = ours(qkv, None, grad, scale), exact(qkv, None, grad, scale)
    for a, b in zip(none[:3], expected, strict=False):
        assert_close(a, b, FP16)
    fixed, learned = ours(qkv, bias, grad, scale, of_bias=False), ours(qkv, bias, grad, scale)
    assert none[3].numel() == fixed[3].numel() == 0
    assert torch.equal(fixed[0], learned[0])
    assert_close(fixed[2], exact(qkv, bias, grad, scale)[2], FP16)


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_the_bias_s_gradient_is_the_sum_over_chunks_of_images(images, plan, monkeypatch):
    for most in ("PROGRAMS", "TILES"):
        monkeypatch.setattr(gpu, most, 2 * 2)  # chunks of several images, of which the last may be short
    qkv, bias, grad = problem(images, 33, 2, 16, FP16)
    assert_close(ours(qkv, bias, grad, 0.25)[3], exact(qkv, bias, grad, 0.25)[3], FP16)
    again = ours(qkv, bias, grad, 0.25)[2:]
    assert all(torch.equal(a, b) for a, b in zip(again, ours(qkv, bias, grad, 0.25)[2:], strict=True))


def test_every_blocks_shape_gives_the_same_numbers(monkeypatch):
    """Those of all plans, with a tail."""
    found = {blocks for plans in gpu.PLANS.values() for plan in plans for blocks in vars(plan).values()}
    found = {blocks for blocks in found if isinstance(blocks, Blocks)}
    assert len(found) > 4
    qkv, bias, grad = problem(1, 81, 1, 16, FP16)
    expected = exact(qkv, bias, grad, 0.25)
    for blocks in found:
        for together in (blocks, None):
            plan = Plan(1 << 30, 128, blocks, blocks, blocks, blocks, together)
            monkeypatch.setitem(gpu.PLANS, "interpreter", (plan,))
            for a, b in zip(ours(qkv, bias, grad, 0.25), expected, strict=True):
                assert_close(a, b, FP16)


def test_an_image_that_is_not_a_number_changes_no_bit_of_the_others(plan):
    qkv, bias, grad = problem(3, 70, 1, 16, BF16)
    good = ours(qkv, bias, grad, 0.25)
    qkv[1], grad[1] = torch.nan, torch.nan
    bad = ours(qkv, bias, grad, 0.25)
    for a, b in zip(good[:3], bad[:3], strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]]) and b[1].isnan().all()
    assert bad[3].isnan().all()


def test_not_a_number_spreads_to_its_rows_only():
    qkv, bias, grad = problem(2, 20, 2, 16, BF16)
    qkv[1, 3, 0, 1, 2] = torch.nan  # a query
    out = ours(qkv, bias, grad, 0.25)[0]
    assert out[1, 3, 1].isnan().all() and out.isnan().sum() == 16


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_keys_with_a_bias_of_minus_infinity_are_left_out(scale, plan):
    qkv, bias, grad = problem(1, 150, 1, 16, BF16)
    hidden = torch.arange(150) < 141  # whole blocks of keys, the first among them
    bias[..., hidden] = -torch.inf
    found = ours(qkv, bias, grad, scale)
    for a, b in zip(found, exact(qkv, bias, grad, scale), strict=True):
        assert_close(a, b, BF16)
    assert (found[2][:, hidden, 1:] == 0).all() and (found[3][..., hidden] == 0).all()


@pytest.mark.parametrize("shift", [0, -4096])
def test_large_scores_neither_overflow_nor_lose_the_largest(shift):
    qkv, bias, grad = (x.mul(10).round() for x in problem(1, 30, 1, 16, BF16))  # whole numbers: bf16 holds them
    bias = bias if shift == 0 else torch.full_like(bias, shift)  # bf16 does not hold their sum
    expected = exact(qkv, bias, grad, 1.0)
    assert expected[1].abs().max() > 500  # 2^128 overflows
    for a, b in zip(ours(qkv, bias, grad, 1.0), expected, strict=True):
        assert_close(a, b, BF16, floor=grad.abs().max().item())


def strided(x: Tensor) -> list[Tensor]:
    order = tuple(reversed(range(x.dim())))
    return [x.permute(order).contiguous().permute(order), torch.cat([x, x], -1)[..., : x.shape[-1]]]


def test_inputs_may_have_any_strides():
    qkv, bias, grad = problem(2, 20, 2, 16, FP16)
    expected = ours(qkv, bias, grad, 0.25)
    for given in zip(strided(qkv), strided(bias), strided(grad), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours(*given, 0.25), expected, strict=True))
    out, lse = expected[:2]
    for o, sums in zip(strided(out), strided(lse), strict=True):
        found = attention_backward_triton(grad, qkv, bias, o, sums, 0.25, True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected[2:], strict=True))


@pytest.mark.parametrize("shape", [(0, 9, 2, 8), (2, 0, 2, 8), (2, 9, 0, 8), (2, 9, 2, 0)])
def test_nothing_gives_nothing_and_no_gradient(shape):
    B, N, H, d = shape
    out, lse, dqkv, dbias = ours(torch.empty(B, N, 3, H, d).half(), torch.ones(H, N, N), torch.empty(shape).half(), 1.0)
    assert out.shape == shape and lse.shape == (B, H, N) and dqkv.shape == (B, N, 3, H, d)
    assert dbias.shape == (H, N, N) and (dbias == 0).all()


@pytest.fixture
def chosen(monkeypatch):
    """The op takes these kernels on the CPU, too."""
    monkeypatch.setattr(ops, "has_gpu_kernel", lambda qkv, scale: qkv.dtype in TOLERANCE)


def test_opcheck(chosen):
    qkv, bias, grad = problem(2, 9, 2, 16, BF16)
    qkv, bias = qkv.clone(), bias.clone()
    out, sums = ops.attention_op(qkv, bias, 0.5)
    assert sums.shape == (2, 2, 9)
    torch.library.opcheck(ops.attention_op, (qkv.clone().requires_grad_(), bias.clone().requires_grad_(), 0.5))
    torch.library.opcheck(ops.attention_op, (qkv.clone().requires_grad_(), None, 0.5))
    for b, of_bias in ((bias, True), (bias, False), (bias.bfloat16(), True), (None, False)):
        torch.library.opcheck(ops.attention_backward_op, (grad, qkv, b, out, sums, 0.5, of_bias))


@pytest.mark.parametrize("bias_dtype", [torch.float32, BF16])
def test_layers_that_share_a_bias_sum_its_gradients_in_its_dtype(chosen, bias_dtype):
    qkv, bias, grad = problem(2, 17, 2, 16, BF16)
    bias = bias[None].to(bias_dtype).requires_grad_()
    out = sum(attention(x, bias).float() for x in (qkv, qkv.flip(0)))
    (found,) = torch.autograd.grad(out, bias, grad.float())
    assert found.dtype == bias_dtype and found.shape == bias.shape
    expected = sum(exact(x, bias[0].detach(), grad, 0.25)[3] for x in (qkv, qkv.flip(0)))
    assert_close(found[0], expected, BF16)


def test_it_compiles_without_a_graph_break_and_with_the_same_gradients(chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    qkv, bias, grad = problem(2, 17, 2, 16, BF16)
    inputs = [qkv.clone().requires_grad_(), bias.clone().requires_grad_()]
    results = []
    for function in (attention, torch.compile(attention, fullgraph=True)):
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
