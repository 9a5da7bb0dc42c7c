"""attention on a GPU: values and gradients of the definition in float64, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beitv2_fast.kernels import attention
from beitv2_fast.kernels.attention.ops import attention_backward_op, attention_op
from beitv2_fast.kernels.attention.reference import attention_reference

from ..support.gpu import DRY, HERE, cuda_only, distance, no_waiting, pick

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
# Operands of every product (bias, p and ds among them) are rounded to the dtype; fp32 is the definition itself.
TOLERANCE = {torch.float32: 1e-5, FP16: 2e-3, BF16: 1.5e-2}
Results = list[Tensor]


def problem(images: int, tokens: int, heads: int, width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    """qkv, bias, and a gradient from above."""
    images = pick(images, min(images, 2))
    shapes = (images, tokens, 3, heads, width), (heads, tokens, tokens), (images, tokens, heads, width)
    qkv, bias, grad = (torch.randn(*shape, device=HERE) for shape in shapes)
    return qkv.to(dtype), bias, grad.to(dtype)


def results(op, qkv: Tensor, bias: Tensor | None, grad: Tensor) -> Results:
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, bias) if x is not None]
    out = op(leaves[0], leaves[1] if bias is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def definition(qkv: Tensor, bias: Tensor | None) -> Tensor:
    return attention_reference(qkv, bias, qkv.shape[-1] ** -0.5)[0]


def exact(qkv: Tensor, bias: Tensor | None, grad: Tensor) -> Results:
    return results(definition, qkv.double(), None if bias is None else bias.double(), grad.double())


def same(a: Results, b: Results) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SHAPES = [
    (3, 17, 2, 64), (3, 65, 6, 64), (3, 128, 2, 64), (3, 197, 3, 64), (7, 197, 2, 32), (2, 208, 1, 64), (2, 209, 2, 64),
    (2, 257, 2, 80), (2, 577, 2, 64), (1, 1025, 1, 128), (5, 33, 2, 24), (1, 37, 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", pick(SHAPES, SHAPES[:2]), ids=str)
def test_values_and_gradients_are_the_definition_s(shape, dtype, with_bias):
    qkv, bias, grad = problem(*shape, dtype)
    given = qkv, bias if with_bias else None, grad
    for ours, right in zip(results(attention, *given), exact(*given), strict=True):
        assert distance(ours, right) < TOLERANCE[dtype]


def test_one_token_attends_to_itself():
    qkv, bias, grad = problem(1, 1, 1, 1)
    out, of_qkv, of_bias = results(attention, qkv, bias, grad)
    assert torch.equal(out, qkv[:, :, 2]) and torch.equal(of_qkv[:, :, 2], grad)
    assert of_qkv[:, :, :2].abs().max() < 1e-2 and of_bias.abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(64, 197, 12, 64), (37, 65, 6, 64), (5, 577, 4, 64)], ids=str)
def test_two_runs_give_the_same_bits(shape):
    given = problem(*pick(shape, (2, 20, 2, 16)))
    once = results(attention, *given)
    assert all(same(once, results(attention, *given)) for _ in range(3))


@pytest.mark.parametrize("tokens", [65, pick(577, 20)])
def test_an_image_that_is_not_a_number_changes_no_bit_of_the_others(tokens):
    qkv, bias, grad = problem(2, tokens, 2, 64)
    good = results(attention, qkv, bias, grad)
    qkv[1], grad[1] = torch.nan, torch.nan
    bad = results(attention, qkv, bias, grad)
    assert same([good[0][0], good[1][0]], [bad[0][0], bad[1][0]])
    assert bad[0][1].isnan().all() and bad[1][1].isnan().all() and bad[2].isnan().all()


@pytest.mark.parametrize("tokens", [65, pick(577, 20)])
def test_keys_with_a_bias_of_minus_infinity_are_left_out(tokens):
    qkv, bias, grad = problem(2, tokens, 2, 64)
    bias[..., : tokens - 9] = -torch.inf
    found = results(attention, qkv, bias, grad)
    for ours, right in zip(found, exact(qkv, bias, grad), strict=True):
        assert distance(ours, right) < TOLERANCE[BF16]
    assert (found[1][:, : tokens - 9, 1:] == 0).all() and (found[2][..., : tokens - 9] == 0).all()


def test_inputs_of_any_strides_are_taken_as_they_are():
    qkv, bias, grad = problem(2, 50, 2, 32)
    expected = results(attention, qkv, bias, grad)
    turned = [x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
              for x in (qkv, bias, grad)]  # fmt: skip
    assert same(expected, results(lambda x, b: attention(x, b), *turned))
    leaf = qkv.clone().requires_grad_()
    attention(leaf, bias).sum().backward()  # a gradient of stride 0
    (dense,) = torch.autograd.grad(attention(leaf, bias), leaf, torch.ones_like(grad))
    assert torch.equal(leaf.grad, dense)


def test_the_bias_s_gradient_has_its_dtype():
    qkv, bias, grad = problem(3, 65, 2, 64)
    for dtype in (torch.float32, BF16):
        found = results(attention, qkv, bias[None].to(dtype), grad)[2]
        assert found.dtype == dtype and found.shape == (1, *bias.shape)


@cuda_only
def test_the_scores_of_all_images_never_exist():
    qkv, bias, grad = problem(64, 197, 12, 64)
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]
    results_alone = 2 * qkv.numel() * 4 // 3  # bytes of out and of the gradient of qkv; scores would be as many again
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention(*leaves), leaves, grad)
    assert torch.cuda.max_memory_allocated() - before < 1.3 * results_alone


def test_the_host_waits_for_nothing():
    given = problem(3, 65, 2, 64)
    expected = results(attention, *given)
    with no_waiting():
        again = results(attention, *given)
    assert same(expected, again)


@pytest.mark.parametrize("tokens", [65, pick(209, 20)])
def test_it_compiles_with_the_same_bits(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    qkv, bias, grad = problem(2, tokens, 2, 64)
    compiled = torch.compile(attention, fullgraph=True)
    assert same(results(attention, qkv, bias, grad), results(compiled, qkv, bias, grad))


def test_opcheck():
    qkv, bias, grad = problem(2, 9, 2, 16)
    out, sums = attention_op(qkv, bias, 0.5)
    assert DRY or sums.shape == (2, 2, 9)
    torch.library.opcheck(attention_op, (qkv.clone().requires_grad_(), bias.clone().requires_grad_(), 0.5))
    torch.library.opcheck(attention_backward_op, (grad, qkv, bias, out, sums, 0.5, True))


@cuda_only
def test_a_step_is_captured_in_a_graph_and_replayed_with_the_same_bits():
    qkv, bias, grad = problem(3, 65, 2, 64)
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]

    def step() -> Results:
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert same(expected, captured)
