"""Every Triton kernel with small, odd sizes and right results, in one short process for compute-sanitizer to watch:

compute-sanitizer --tool memcheck python -m pytest -m gpu -k every_kernel_once tests/kernels
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import beitv2_fast.kernels as kernels
from beitv2_fast.kernels.codebook_search.reference import codebook_search_reference, draw_codes_reference
from beitv2_fast.kernels.codebook_update.reference import apply_statistics_reference, codebook_statistics_reference
from beitv2_fast.kernels.counter_random import random_bits
from beitv2_fast.kernels.masked_cross_entropy.chunked import Device, Head, Wanted, head_losses
from beitv2_fast.kernels.vector_quantize.reference import vector_quantize_backward_reference

from ..support.codebook_states import make_batch, make_state
from ..support.gpu import DRY, HERE, here, launches
from ..support.masked_problem import problem

search = pytest.importorskip(
    "beitv2_fast.kernels.codebook_search.triton", reason="triton is not installed", exc_type=ImportError
)
pytestmark = [pytest.mark.gpu, launches]
INDIRECTLY = {"screen"}  # launched by an autotuner
METRICS = ("cosine", "euclidean")


def launched_kernels() -> set[str]:
    """The names in the modules of ``kernels`` that are launched: ``name[grid](...)``."""
    names = set(INDIRECTLY)
    for path in Path(kernels.__file__).parent.glob("*/triton*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        calls = (node.func for node in nodes if isinstance(node, ast.Call))
        launched = (func.value for func in calls if isinstance(func, ast.Subscript))
        variables = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {value.id for value in launched if isinstance(value, ast.Name)} - variables
    return names


def search_codes(monkeypatch) -> None:
    """Every configuration of this device's plan, none of them timed."""
    name = search.target_name()
    plan = search.PLANS[name]
    for config in (*plan.configs, *plan.wide):
        monkeypatch.setitem(search.PLANS, name, replace(plan, configs=(config,), wide=(config,)))
        for (n, k, d), metric in zip(
            ((157, 123, 3), (90, 700, 33), (1, 1, 1), (35, 300, 200)), 2 * METRICS, strict=True
        ):
            x, codebook = torch.randn(n, d, device=HERE), torch.randn(k, d, device=HERE)
            found = search.codebook_search_triton(x, codebook, metric, True, True, True, split=2 if k > 500 else 1)
            indices, normalized = codebook_search_reference(x, codebook, metric)
            assert torch.equal(found[0], indices) and torch.equal(found[2], codebook[indices])
            torch.testing.assert_close(found[1], normalized, rtol=1e-5, atol=1e-6)
            key, numbers = torch.tensor(5, device=HERE), torch.arange(n, device=HERE)
            drawn = search.draw_codes_triton(x, codebook, metric, 0.3, random_bits(key, numbers))
            assert torch.equal(drawn, draw_codes_reference(x, codebook, metric, 0.3, key, numbers))
            few = min(k, 5)
            order = codebook_search_reference(x, codebook, metric, few)[0]
            assert torch.equal(search.nearest_codes_triton(x, codebook, metric, few), order)


def update_codebook() -> None:
    from beitv2_fast.kernels.codebook_update.triton import (
        apply_statistics_triton,
        codebook_statistics_triton,
        count_uses_triton,
    )

    bins, idle, window = (here(torch.arange(123) % m) for m in (3, 5, 7))
    expected = torch.where(bins > 0, 0, idle + bins.sum())
    count_uses_triton(bins, idle, window, None)
    assert torch.equal(idle, expected) and torch.equal(window, here(torch.arange(123) % 7) + bins)
    for metric, average in (("cosine", False), ("cosine", True), ("euclidean", True)):
        for count, num_codes, dim in ((157, 123, 33), (1, 1, 1)):
            x, indices = (here(t) for t in make_batch(count, num_codes, dim))
            indices[::7] = -1
            statistics = codebook_statistics_triton(x, indices, num_codes, metric)
            assert torch.equal(statistics, codebook_statistics_reference(x, indices, num_codes, metric))
            ours, theirs = (make_state(num_codes, dim, average=average) for _ in range(2))
            for state, apply in ((ours, apply_statistics_triton), (theirs, apply_statistics_reference)):
                for name, value in vars(state).items():
                    setattr(state, name, here(value))
                apply(statistics, state.codebook, state.cluster_size, state.embed_avg, 0.9, metric, 1e-5)
            assert ours.same_bits(theirs)


def quantize_backward() -> None:
    from beitv2_fast.kernels.vector_quantize.triton import vector_quantize_backward_triton

    for metric in METRICS:
        for given in ((True, True), (True, False), (False, True)):
            x, quantized, grad = (torch.randn(57, 33, device=HERE) for _ in range(3))
            gradients = (grad if given[0] else None, torch.ones((), device=HERE) if given[1] else None)
            ours = vector_quantize_backward_triton(x, quantized, *gradients, 0.25, metric)
            theirs = vector_quantize_backward_reference(x, quantized, *gradients, 0.25, metric)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def head(monkeypatch) -> None:
    from beitv2_fast.kernels.masked_cross_entropy import triton
    from beitv2_fast.kernels.masked_cross_entropy.triton import head_losses_triton, scatter_rows_triton, weigh_triton

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        for has_bias in (True, False):
            monkeypatch.setattr(triton, "WHOLE_ROW", (1 << 14) * has_bias)  # rows in registers, or block by block
            p = here(vars(problem(images=3, patches=9, num_masked=4, dim=100, classes=83)))
            positions, bias = p["mask"].flatten().nonzero()[:, 0], p["bias"].detach() if has_bias else None
            parts = [t.detach() for t in (p["norm_weight"], p["norm_bias"], 0.1 * p["weight"])]
            given = (
                [t.detach()[:, 1:] for t in p["tokens"]],
                positions,
                p["labels"],
                Head(*parts[:2], 1e-6, parts[2], bias),
            )
            for wanted in (Wanted(True, True, True), Wanted(False, False, False)):
                ours = head_losses_triton(*given, dtype, wanted)
                theirs = head_losses(*given, torch.float32, wanted, Device(1 << 22))
                for a, b in zip((ours.losses, *ours.grad_rows), (theirs.losses, *theirs.grad_rows), strict=True):
                    assert (a - b).norm() <= tolerance * b.norm()
    rows = torch.randn(12, 100, device=HERE)
    assert torch.equal(scatter_rows_triton(rows, positions, 3, 9).flatten(0, 1)[positions], rows)
    upstream, known = torch.randn(2, device=HERE), torch.randn(2, 83, 100, device=HERE)
    weighed = scatter_rows_triton(rows, positions, 3, 9, upstream[1:], 0.5, torch.float32)
    torch.testing.assert_close(weighed.flatten(0, 1)[positions], rows * (upstream[1] * 0.5))
    torch.testing.assert_close(
        weigh_triton(upstream, known, 1, torch.float32), torch.einsum("l,lvc->vc", upstream, known)
    )


def residual_norm() -> None:
    from beitv2_fast.kernels.residual_norm import reference
    from beitv2_fast.kernels.residual_norm.triton import residual_norm_backward_triton, residual_norm_triton

    x, branch, grad_sum, grad_norm = torch.randn(4, 3, 19, 33, device=HERE).unbind(0)
    gamma, weight, bias = torch.randn(3, 33, device=HERE).unbind(0)
    keep = torch.ones(3, device=HERE)
    total, norm, mean, rstd = residual_norm_triton(
        x, branch, gamma, keep, 0.5, weight, bias, 1e-6, torch.float32, torch.float32
    )
    expected = reference.residual_norm_reference(x, branch, gamma, keep, 0.5, weight, bias, 1e-6)
    torch.testing.assert_close((total, norm), expected, rtol=1e-4, atol=1e-5)
    given = grad_sum, grad_norm, total, mean, rstd, branch, gamma, keep, 0.5, weight, torch.float32, torch.float32
    theirs = reference.residual_norm_backward_reference(*given)
    torch.testing.assert_close(residual_norm_backward_triton(*given), theirs, rtol=1e-4, atol=1e-4)


def attend() -> None:
    """By the plans for few and for many tokens, with and without a bias and its gradient."""
    from beitv2_fast.kernels.attention.reference import attention_backward_reference, attention_reference
    from beitv2_fast.kernels.attention.triton import attention_backward_triton, attention_triton

    for tokens, width, dtype in ((1, 1, torch.float16), (65, 24, torch.float16), (150, 64, torch.bfloat16),
                                 (209, 16, torch.float16), (33, 80, torch.bfloat16)):  # fmt: skip
        qkv, grad = torch.randn(2, tokens, 3, 2, width, device=HERE), torch.randn(2, tokens, 2, width, device=HERE)
        qkv, grad, bias = qkv.to(dtype), grad.to(dtype), torch.randn(2, tokens, tokens, device=HERE)
        for given, of_bias in ((bias, True), (bias, False), (None, False)):
            out, lse = attention_triton(qkv, given, 0.3)
            gradients = attention_backward_triton(grad, qkv, given, out, lse, 0.3, of_bias)
            wide = qkv.double(), None if given is None else bias.double()
            exact = attention_reference(*wide, 0.3)[0], *attention_backward_reference(grad.double(), *wide, 0.3)
            for ours, right in zip((out, *gradients[: 1 + of_bias]), exact, strict=False):
                assert (ours - right).norm() <= 2e-2 * max(right.norm(), 1.0)


def gelu() -> None:
    from beitv2_fast.kernels.gelu.reference import gelu_and_gradient_reference
    from beitv2_fast.kernels.gelu.triton import gelu_and_gradient_triton

    x, grad = torch.randn(2, 57, 33, device=HERE)
    ours, theirs = gelu_and_gradient_triton(x, grad), gelu_and_gradient_reference(x, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def paint() -> None:
    from beitv2_fast.kernels.block_masks.reference import block_masks_reference
    from beitv2_fast.kernels.block_masks.triton import block_masks_triton

    keys, case = torch.arange(5, device=HERE), (7, 5, 20, 4, 0.3, 20)
    assert torch.equal(block_masks_triton(keys, *case).cpu(), block_masks_reference(keys.cpu(), *case))


def test_every_kernel_once(monkeypatch):
    launched, kind = set(), type(search.resolve)
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda self, *a, **k: (launched.add(self.fn.__name__), run(self, *a, **k))[1])
    search_codes(monkeypatch)
    update_codebook()
    quantize_backward()
    head(monkeypatch)
    residual_norm()
    attend()
    gelu()
    paint()
    if not DRY:
        torch.cuda.synchronize()
    assert launched == launched_kernels()
