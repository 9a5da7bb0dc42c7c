"""The Triton kernels of residual_norm, interpreted, against the definition in fp64; behind guard pages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beitv2_fast.kernels.residual_norm.reference import residual_norm_reference

from ..support.quantizers import noise
from ..support.triton_tools import guarded

pytest.importorskip("triton")
from beitv2_fast.kernels.residual_norm import triton as gpu

pytestmark = pytest.mark.interpreted
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# One rounding to the dtype of the result, of sums in fp32; and the norm is of the sum as the stream's dtype holds it.
TOLERANCE = {FP32: 3e-6, FP16: 1e-3, BF16: 8e-3}
NAMES = ("x", "branch", "gamma", "keep", "weight", "bias")
EVERY = "branch gamma keep norm"


def problem(images: int, tokens: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], parts: str) -> dict:
    """What residual_norm is given: the stream in the first dtype, the branch in the second, parameters in fp32."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(images, tokens, width, generator=generator) for _ in range(2))
    gamma, weight, bias = torch.randn(3, width, generator=generator)
    keep = (torch.arange(images) % 2 == 0).float()
    given = dict(x=(3 * x + 1).to(dtypes[0]), branch=branch.to(dtypes[1]), gamma=gamma, keep=keep)
    given |= dict(weight=weight, bias=bias)
    absent = {"branch": ["branch"], "gamma": ["gamma"], "keep": ["keep"], "norm": ["weight", "bias"]}
    for name in (name for part, names in absent.items() if part not in parts for name in names):
        given[name] = None
    return given


def ours(
    given: dict, grad_sum: Tensor | None, grad_norm: Tensor | None, dtypes: tuple, place: Callable = guarded
) -> dict[str, Tensor]:
    x, branch, gamma, keep, weight, bias = (None if given[n] is None else place(given[n]) for n in NAMES)
    total, norm, mean, rstd = gpu.residual_norm_triton(x, branch, gamma, keep, 0.5, weight, bias, 1e-6, *dtypes)
    stream, branch_dtype = (x if branch is None else total), None if branch is None else branch.dtype
    gradients = [None if g is None else place(g) for g in (grad_sum, grad_norm)]
    grad_x, grad_branch, of_parameters = gpu.residual_norm_backward_triton(
        *gradients, stream, mean, rstd, branch, gamma, keep, 0.5, weight, x.dtype, branch_dtype
    )
    names = ["gamma"] * (gamma is not None) + ["weight", "bias"] * (grad_norm is not None)
    found = {"sum": stream, "norm": norm, "of branch": grad_branch, **dict(zip(names, of_parameters, strict=True))}
    return {"of x": grad_x, **found} if grad_norm is not None else found


def exact(given: dict, grad_sum: Tensor | None, grad_norm: Tensor | None) -> dict[str, Tensor]:
    leaves = {n: None if t is None else t.double().requires_grad_(n != "keep") for n, t in given.items()}
    x, branch, gamma, keep, weight, bias = (leaves[n] for n in NAMES)
    total, norm = residual_norm_reference(x, branch, gamma, keep, 0.5, weight, bias, 1e-6)
    pairs = [(o, g.double()) for o, g in ((total, grad_sum), (norm, grad_norm)) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    named = {"of x": x, "of branch": branch, "gamma": gamma, "weight": weight, "bias": bias}
    found = {"sum": total, "norm": norm} | {n: t.grad for n, t in named.items() if t is not None}
    return {n: t.detach() for n, t in found.items() if t is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in found.items():
        if value.numel():
            tolerance = max(TOLERANCE[value.dtype], TOLERANCE[found["sum"].dtype])
            atol = tolerance * (expected[name].abs().max().item() + 1e-3)
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    "parts",
    [
        EVERY,
        "branch gamma norm",
        "branch keep norm",
        "branch norm",
        "norm",
        "branch gamma keep",
        "branch gamma",
        "branch",
    ],
)
@pytest.mark.parametrize(
    ("stream", "branch"), [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16)], ids=lambda d: str(d)[6:]
)
def test_values_and_gradients_are_those_of_fp64(stream, branch, parts):
    given = problem(3, 5, 24, (stream, branch), parts)
    norm_dtype = branch
    upstream = noise(3, 5, 24).to(stream), noise(3, 5, 24, seed=1).to(norm_dtype)
    gradients = upstream[0], upstream[1] if "norm" in parts else None
    found = ours(given, *gradients, (stream, norm_dtype))
    assert found["sum"].dtype == stream and found["norm"].dtype == norm_dtype
    if "branch" in parts:
        assert found["of branch"].dtype == branch
    assert_equal(found, exact(given, *gradients))


@pytest.mark.parametrize("width", [1, 192, 384, 768, 1024, 1280])
@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (1, 7), (4, 3)])
def test_every_size(images, tokens, width, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 4)  # several rows, one, and none of each
    given = problem(images, tokens, width, (FP32, FP32), EVERY)
    gradients = noise(2, images, tokens, width).unbind(0)
    found, expected = ours(given, *gradients, (FP32, FP32)), exact(given, *gradients)
    if width == 1:  # a norm of one value has no gradient but rounding
        found.pop("weight"), expected.pop("weight")
    assert_equal(found, expected)


@pytest.mark.parametrize("parts", [EVERY, "norm"])
def test_inputs_of_any_strides_have_the_values_of_dense_ones(parts):
    given, gradients = problem(3, 5, 24, (FP32, FP32), parts), noise(2, 3, 5, 24)
    dense = ours(given, *gradients, (FP32, FP32))
    for name in ("x", "branch"):
        given[name] = None if given[name] is None else turned(given[name])
    found = ours(given, *map(turned, gradients), (FP32, FP32), place=lambda t: t)
    assert all(torch.equal(value, dense[name]) for name, value in found.items())


def turned(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


@pytest.mark.parametrize("absent", ["sum", "norm"])
def test_a_gradient_that_is_absent_is_zero(absent):
    given = problem(2, 3, 40, (FP32, FP32), EVERY)
    gradients = [*noise(2, 2, 3, 40)]
    gradients[absent == "norm"] = None
    found = ours(given, *gradients, (FP32, FP32))
    assert_equal(found, exact(given, *gradients))


def test_a_row_of_nan_stays_alone():
    given = problem(2, 6, 40, (FP32, BF16), "branch gamma norm")
    gradients = noise(2, 6, 40), noise(2, 6, 40, seed=1).to(BF16)
    clean = ours(given, *gradients, (FP32, BF16))
    given["branch"][1, 2, 3] = torch.nan
    found = ours(given, *gradients, (FP32, BF16))
    for name in ("sum", "norm", "of x", "of branch"):
        a, b = found[name].flatten(0, 1), clean[name].flatten(0, 1)
        assert a[8].isnan().any() and torch.equal(a[torch.arange(12) != 8], b[torch.arange(12) != 8]), name


def test_the_norm_is_of_the_sum_as_it_is_stored():
    given = problem(2, 5, 64, (BF16, BF16), "branch norm")
    found = ours(given, None, torch.zeros(2, 5, 64), (BF16, FP32))
    expected = torch.nn.functional.layer_norm(found["sum"].float(), [64], given["weight"], given["bias"], 1e-6)
    torch.testing.assert_close(found["norm"], expected, rtol=1e-5, atol=1e-5)
