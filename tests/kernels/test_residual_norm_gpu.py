"""residual_norm on a GPU: values and gradients of the definition in fp64, the same bits every time."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels import residual_norm
from beitv2_fast.kernels.residual_norm.reference import residual_norm_reference

from ..support.gpu import HERE, autocast, distance, here, no_waiting, pick
from .test_residual_norm import PARTS, gradients, problem

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def wide(images: int, tokens: int, width: int) -> list:
    x, branch = torch.randn(2, images, tokens, width, device=HERE).unbind(0)
    gamma, weight, bias = torch.randn(3, width, device=HERE).unbind(0)
    keep = (torch.arange(images, device=HERE) % 3 > 0).float()
    leaves = [t.clone().requires_grad_() for t in (x, branch, gamma)]
    return [*leaves, keep, 0.5, weight.requires_grad_(), bias.requires_grad_(), 1e-6]


def exact(arguments: list) -> list:
    return [
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_values_and_gradients_are_the_definition_s(parts, dtype):
    arguments = here(problem(parts, torch.float32))
    if arguments[1] is not None:
        arguments[1] = arguments[1].detach().to(dtype).requires_grad_()
    with autocast(dtype):
        ours = gradients(residual_norm, arguments)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, gradients(residual_norm_reference, exact(arguments)), strict=True):
        assert distance(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [1, 192, 384, 768, 1024, 1280])
@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (1, 65), (pick(40, 4), 197)])
def test_every_size(images, tokens, width):
    arguments = wide(images, tokens, width)
    names = "sum norm x branch gamma weight bias".split()
    pairs = zip(gradients(residual_norm, arguments), gradients(residual_norm_reference, exact(arguments)), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        if b.abs().max() > 1e-5:  # a norm of one value has no gradient but rounding, times 1 / sqrt(eps)
            assert distance(a, b) < (1e-5 if width > 1 else 1e-3), name


@pytest.mark.parametrize("parts", [("branch", "gamma", "norm"), ("norm",)], ids=" ".join)
def test_inputs_and_gradients_of_any_strides_are_taken_as_they_are(parts):
    arguments = here(problem(parts, torch.float32))
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    transposed = [t if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for t in arguments[:2]]
    total, norm = residual_norm(*transposed, *arguments[2:])
    found = torch.autograd.grad(total.sum() + norm.sum(), leaves)
    dense = [torch.ones_like(total), torch.ones_like(norm)]
    expected = torch.autograd.grad(residual_norm(*arguments), leaves, dense)
    assert all(distance(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def test_a_row_of_nan_stays_alone_and_the_same_input_has_the_same_bits():
    arguments = wide(8, 65, 384)
    first, second = (gradients(residual_norm, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    arguments[1].data[4, 7, 100] = torch.nan
    others = torch.arange(8 * 65, device=HERE) != 4 * 65 + 7
    for a, b in zip(gradients(residual_norm, arguments)[:4], first[:4], strict=True):
        assert torch.equal(a.flatten(0, 1)[others], b.flatten(0, 1)[others])
        assert a[4, 7].isnan().any()


def test_no_images_have_gradients_of_zero():
    *_, of_weight, of_bias = gradients(residual_norm, wide(0, 5, 16))
    assert (of_weight == 0).all() and (of_bias == 0).all()


def test_the_host_waits_for_nothing():
    arguments = wide(2, 9, 48)
    expected = gradients(residual_norm, arguments)
    upstream = [torch.ones_like(t) for t in expected[:2]]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    with no_waiting():
        found = torch.autograd.grad(residual_norm(*arguments), leaves, upstream)
    assert all(g.isfinite().all() for g in found)
