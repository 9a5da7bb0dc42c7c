"""residual_norm: the definition on the CPU, and the op and its derivative that stand behind it on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast.kernels import residual_norm
from beitv2_fast.kernels.residual_norm.ops import backward_op, forward_op, residual_norm_op
from beitv2_fast.kernels.residual_norm.reference import residual_norm_reference

PARTS = [
    ("branch", "gamma", "keep", "norm"),
    ("branch", "keep", "norm"),
    ("branch", "norm"),
    ("norm",),
    ("branch", "gamma"),
    ("branch",),
]


def problem(parts: tuple[str, ...], dtype: torch.dtype = torch.float64) -> list[Tensor | float | None]:
    """Arguments of residual_norm, with those of ``parts``: 3 images of 5 tokens of width 12."""
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 3, 5, 12, generator=generator).to(dtype).unbind(0)
    gamma, weight, bias = torch.randn(3, 12, generator=generator).to(dtype).unbind(0)
    keep = torch.tensor([1, 0, 1], dtype=dtype)
    given = {"x": x, "branch": branch, "gamma": gamma, "keep": keep, "weight": weight, "bias": bias}
    wanted = {"x", *parts} | ({"weight", "bias"} if "norm" in parts else set())
    found = {n: t.clone().requires_grad_(n != "keep") if n in wanted else None for n, t in given.items()}
    return [*list(found.values())[:4], 0.5, found["weight"], found["bias"], 1e-6]


def gradients(function, arguments: list, *, of_sum: bool = True, of_norm: bool = True) -> list[Tensor]:
    """The results, and the gradients of all that has one; those from above are the same every time."""
    generator = torch.Generator().manual_seed(1)
    results = [out for out in function(*arguments) if out is not None]
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in results]
    wanted = [of_sum, of_norm][: len(results)]
    pairs = [pair for pair, want in zip(zip(results, upstream, strict=True), wanted, strict=True) if want]
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    outputs, above = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves, above, allow_unused=True)
    return results + [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_the_definition_is_residual_layer_scale_drop_path_and_layer_norm(parts):
    x, branch, gamma, keep, keep_rate, weight, bias, eps = problem(parts)
    expected = x
    if branch is not None:
        scaled = branch if gamma is None else gamma * branch
        expected = x + (scaled if keep is None else scaled * keep[:, None, None] / keep_rate)
    total, norm = residual_norm(x, branch, gamma, keep, keep_rate, weight, bias, eps)
    assert torch.equal(total, expected)
    assert norm is None if weight is None else torch.equal(norm, F.layer_norm(expected, [12], weight, bias, eps))


@pytest.mark.parametrize(("of_sum", "of_norm"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_the_op_has_the_definition_s_values_and_gradients(parts, of_sum, of_norm):
    of_sum = of_sum or "norm" not in parts
    wanted = {"of_sum": of_sum, "of_norm": of_norm}
    arguments = problem(parts, torch.float32)
    ours = gradients(residual_norm_op, arguments, **wanted)
    theirs = gradients(residual_norm_reference, problem(parts), **wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * max(b.abs().max().item(), 1))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(residual_norm_op(*arguments), ours, strict=False) if a is not None)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_under_autocast_the_op_gives_the_norm_in_its_dtype_and_a_stream_that_is_not_narrowed(stream):
    arguments = [t.bfloat16().detach() if i == 1 else t for i, t in enumerate(problem(PARTS[0], torch.float32))]
    arguments[0], arguments[1] = arguments[0].detach().to(stream).requires_grad_(), arguments[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(residual_norm_op, arguments)
    assert [t.dtype for t in found[:2]] == [torch.float32, torch.bfloat16]
    assert [t.dtype for t in found[2:]] == [stream, torch.bfloat16] + [torch.float32] * 3


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_the_ops_are_what_they_are_registered_as(parts):
    x, branch, gamma, keep, keep_rate, weight, bias, eps = [
        t.detach().float() if isinstance(t, Tensor) else t for t in problem(parts)
    ]
    tests = ("test_schema", "test_faketensor")
    arguments = (x, branch, gamma, keep, keep_rate, weight, bias, eps, torch.float32, torch.bfloat16)
    torch.library.opcheck(forward_op, arguments, test_utils=tests)
    _, norm, mean, rstd = forward_op(*arguments)
    normed = (None,) * 4 if weight is None else (norm, x, mean, rstd)
    branch_dtype = None if branch is None else branch.dtype
    torch.library.opcheck(
        backward_op,
        (x.clone(), *normed, branch, gamma, keep, keep_rate, weight, torch.float32, branch_dtype),
        test_utils=tests,
    )


def test_what_does_not_fit_is_named():
    x, vector = torch.zeros(2, 3, 4), torch.zeros(4)
    for options, message in (
        (dict(branch=torch.zeros(2, 3, 5)), r"branch must have x's shape \[2, 3, 4\]; got \[2, 3, 5\]"),
        (dict(branch=x, gamma=torch.zeros(1, 4)), r"gamma must be \[4\].*got \[1, 4\]"),
        (dict(weight=vector), "needs both weight and bias"),
        (dict(weight=torch.zeros(3), bias=vector), r"weight must be \[4\].*got \[3\]"),
        (dict(branch=x, keep=torch.zeros(3)), "one value for each of 2 images; got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            residual_norm(x, **options)
