"""masked_gather and masked_cross_entropy on a GPU: against fp64, and without waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from beitv2_fast.kernels import masked_gather

from .masked_problem import Problem, problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

# Relative to the norm: the rounding of operands and of logits to the dtype; fp32 sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def on_gpu(**sizes) -> Problem:
    p = problem(**sizes)
    return replace(
        p,
        tokens=[t.detach().cuda().requires_grad_() for t in p.tokens],
        mask=p.mask.cuda(),
        labels=p.labels.cuda(),
        **{
            name: getattr(p, name).detach().cuda().requires_grad_()
            for name in ("norm_weight", "norm_bias", "weight", "bias")
        },
    )


def assert_near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert (ours.double() - exact.double()).norm() <= tolerance * exact.double().norm() + 1e-6


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "cast model"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_losses_and_gradients_are_near_fp64(dtype, autocast):
    p = on_gpu(images=16, patches=49, num_masked=20, dim=96, classes=1000)
    p = replace(p, weight=(p.weight.detach() * 0.2).requires_grad_())
    p = p if autocast else p.to(dtype)
    upstream = torch.tensor([1.0, 0.25], device="cuda")
    with torch.autocast("cuda", dtype=dtype, enabled=autocast and dtype != torch.float32):
        losses, _ = p.ours()
        with torch.no_grad():
            alone, _ = p.ours()
    exact = p.to(torch.float64)
    exact_losses = exact.reference()[0]
    assert losses.dtype == torch.float32
    assert_near(losses, exact_losses, TOLERANCE[dtype])
    assert_near(alone, exact_losses, TOLERANCE[dtype])
    ours = torch.autograd.grad(losses, p.leaves, upstream)
    theirs = torch.autograd.grad(exact_losses, exact.leaves, upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, TOLERANCE[dtype])


def test_the_host_waits_for_nothing():
    p = on_gpu(images=4, patches=49, num_masked=20, dim=96, classes=1000)
    p.ours()[0].sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.ours()[0].sum().backward()
        masked_gather(p.branches[0], p.mask, num_masked=20).sum().backward()
        with torch.no_grad():
            p.ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gradients_are_the_same_bits_every_time():
    p = on_gpu(images=16, patches=49, num_masked=20, dim=96, classes=1000)
    first, second = (torch.autograd.grad(p.ours()[0].sum(), p.leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_logits_in_memory_without_gradients():
    p = on_gpu(images=64, patches=100, num_masked=100, dim=32, classes=8192)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        p.ours()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        p.ours()
    assert torch.cuda.max_memory_allocated() - before < len(p.labels) * 8192 * 2 / 8


def test_a_label_outside_the_vocabulary_is_a_nan_loss():
    p = on_gpu()
    labels = p.labels.clone()
    labels[0] = 83
    assert replace(p, labels=labels).ours()[0].isnan().all()


def test_compiles_without_a_graph_break(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    p = on_gpu()
    compiled = torch.compile(lambda: p.ours()[0].sum(), fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(), p.leaves), torch.autograd.grad(p.ours()[0].sum(), p.leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
