"""Attention on a GPU: every implementation against the definition in float64, the bias's gradient among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beitv2_fast.kernels.attention.reference import attention_reference
from beitv2_fast.models.attention import IMPLEMENTATIONS, attend, choose_attention, prepare_bias, xformers_problem

from ..support.gpu import HERE, autocast, cuda_only, distance, no_waiting, pick

pytestmark = pytest.mark.gpu
# Scores and probabilities are rounded to the dtype, and so are the bias and its gradient.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(3, 197, 3, 64), (1, 37, 12, 64), (2, 10, 2, 16), (1, 1, 1, 8)]  # images, tokens, heads, width of a head
NAMES = IMPLEMENTATIONS[1:]  # "auto" is one of them


def runnable(name: str) -> str:
    if name == "xformers" and (problem := xformers_problem(HERE)):
        pytest.skip(f"xformers: {problem}")
    return name


def problem(images: int, tokens: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, bias, and a gradient from above."""
    images = pick(images, 1)
    shapes = (images, tokens, 3, heads, width), (1, heads, tokens, tokens), (images, tokens, heads * width)
    return tuple(torch.randn(*shape, device=HERE) for shape in shapes)


def results(name: str, qkv: Tensor, bias: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, as a block under autocast calls it."""
    leaves = [t.detach().clone().requires_grad_() for t in (qkv, bias) if t is not None]
    with autocast(dtype):
        prepared = None if bias is None else prepare_bias(leaves[1], name)
        out = attend(leaves[0].to(dtype), prepared, name)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def exact(qkv: Tensor, bias: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (qkv.to(dtype), bias) if t is not None]
    out = attention_reference(leaves[0], leaves[1] if bias is not None else None, qkv.shape[-1] ** -0.5)[0].flatten(2)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype).double())]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "native"])  # which tests/kernels has
def test_output_and_gradients_are_the_definition_s(name, shape, dtype, with_bias):
    qkv, bias, upstream = problem(*shape)
    given = qkv, bias if with_bias else None, upstream, dtype
    ours, theirs = results(runnable(name), *given), exact(*given)
    assert ours[0].dtype == dtype
    if shape[1] == 1:  # one token attends to itself: q, k and the bias have no gradient but rounding
        assert distance(ours[0], theirs[0]) < TOLERANCE[dtype]
        assert distance(ours[1][:, :, 2], theirs[1][:, :, 2]) < TOLERANCE[dtype]
        return
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_without_a_gradient_gives_the_same_output(name):
    qkv, bias, upstream = problem(*SHAPES[1])
    out = results(runnable(name), qkv, bias, upstream, torch.bfloat16)[0]
    with torch.no_grad(), autocast(torch.bfloat16):
        alone = attend(qkv.bfloat16(), prepare_bias(bias, name), name)
    assert distance(alone, out) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_for_nothing(name):
    given = *problem(*SHAPES[1]), torch.bfloat16
    expected = results(runnable(name), *given)
    with no_waiting():
        again = results(name, *given)
    assert all(distance(a, b) < TOLERANCE[torch.bfloat16] for a, b in zip(again, expected, strict=True))


@cuda_only
def test_auto_is_what_the_machine_has():
    measured = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    others = "sdpa" if xformers_problem("cuda") else "xformers"
    assert choose_attention("auto", "cuda") == ("native" if measured else others)
