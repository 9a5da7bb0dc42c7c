"""A training step of every form of the quantizer beside vector-quantize-pytorch's module of the same options.

Sizes: ``BENCH_N``, ``BENCH_K`` and ``BENCH_D``; by default a quarter of the other benchmarks' vectors. The peer's
matrices of N x K have to fit into the memory that is free; where they do not, ours runs alone.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast import replace_quantizers
from beitv2_fast.kernels import codebook_search, draw_codes
from beitv2_fast.quantize.soft import entropies, index_backpropagation, soft_assignment
from bench.harness import DEVICE, OURS, measure_in_turns

N, K, D = (int(os.environ.get(f"BENCH_{name}", size)) for name, size in (("N", 3136), ("K", 8192), ("D", 32)))
ROUNDS = 3
PEER = "vector-quantize-pytorch"
MATRICES = {"SimVQ": 1, "ResidualSimVQ": 1}  # of N x K floats that the peer has at its peak, measured; of others 6
HEADS = {"heads": 4, "codebook_dim": D // 4}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine, moving average": ("VectorQuantize", {"use_cosine_sim": True}),
    "Euclidean, moving average": ("VectorQuantize", {}),
    "learnt by gradient": ("VectorQuantize", LEARNABLE),
    "optimizer in place": ("VectorQuantize", {**LEARNABLE, "in_place_codebook_optimizer": torch.optim.Adam}),
    "4 heads, one codebook": ("VectorQuantize", HEADS),
    "product of 4 codebooks": ("VectorQuantize", {**HEADS, "separate_codebook_per_head": True}),
    "SimVQ": ("SimVQ", {}),
    "residual, 4 stages": ("ResidualVQ", {"num_quantizers": 4}),
    "residual, 4 stages, one codebook": ("ResidualVQ", {"num_quantizers": 4, "shared_codebook": True}),
    "residual SimVQ, 4 stages": ("ResidualSimVQ", {"num_quantizers": 4}),
    "2 groups of 4 stages": ("GroupedResidualVQ", {"num_quantizers": 4, "groups": 2}),
    "random projection": ("RandomProjectionQuantizer", {"codebook_dim": D}),
    "stochastic": ("VectorQuantize", {"stochastic_sample_codes": True}),
    "diversity loss": ("VectorQuantize", {"codebook_diversity_loss_weight": 1.0}),
    "cross-entropy commitment": ("VectorQuantize", {"commitment_use_cross_entropy_loss": True}),
}


def step(module: nn.Module, n: int) -> Callable[[], object]:
    """Forward, the gradients of vectors and parameters, and what the forward moves."""
    x = torch.randn(8, n // 8, D, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()

    learnt = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> object:
        out = module(x)
        if isinstance(out, Tensor):
            return out  # indices, all that a random projection has
        quantized, _, loss, *_ = out
        return torch.autograd.grad(loss.sum() + quantized.square().sum(), learnt, allow_unused=True)

    return run


def modules(form: str, k: int) -> dict[str, Callable[[], nn.Module]]:
    """By name what makes the form: ours, swapped into the peer's, and the peer's, from the same state."""
    package = pytest.importorskip("vector_quantize_pytorch", reason=f"{PEER} is not installed (extra: bench)")
    cls, options = FORMS[form]
    torch.manual_seed(0)
    peer = getattr(package, cls)(dim=D, codebook_size=k, **options).to(DEVICE).train()
    return {OURS: lambda: replace_quantizers(copy.deepcopy(peer)), PEER: lambda: peer}


def fits(size: int) -> bool:
    """Whether so many bytes of main memory are free, with some to spare."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    return found is None or size < 0.8 * 1024 * int(found[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step(benchmark, form):
    runs = {name: step(make(), N) for name, make in modules(form, K).items()}
    cls, options = FORMS[form]
    if not fits(MATRICES.get(cls, 6) * 4 * N * K * options.get("heads", 1)):
        del runs[PEER]
    results = measure_in_turns(benchmark, f"{form} N={N} K={K} D={D}", runs, rounds=ROUNDS)
    peak = results[OURS].peak_bytes
    assert peak is None or peak < max(4 * N * K, 64 << 20)


def four_nearest(n: int, k: int) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(count, D, generator=generator).to(DEVICE) for count in (n, k))
    return {
        OURS: lambda: codebook_search(x, codes, metric="euclidean", k=4).indices,
        "torch cdist + topk": lambda: torch.cdist(x, codes).topk(4, largest=False).indices,
        "torch matmul + topk": lambda: (x @ codes.T - codes.square().sum(-1) / 2).topk(4).indices,
    }


def test_the_four_nearest_codes(benchmark):
    measure_in_turns(benchmark, f"4 nearest N={N} K={K} D={D}", four_nearest(N, K), rounds=ROUNDS)


def drawn(scores: Tensor) -> Tensor:
    return (scores - torch.rand_like(scores).log().neg().log()).argmax(-1)


def dense_entropies(scores: Tensor) -> Tensor:
    logarithms = scores.log_softmax(-1)
    p, mean = logarithms.exp(), logarithms.exp().mean(0)
    return (mean * mean.log()).sum() - (p * logarithms).sum(-1).mean()


def dense_assignment(scores: Tensor) -> Tensor:
    return scores.logsumexp(-1).mean() + scores.softmax(-1).mean(0).square().sum()


def dense_index_backpropagation(scores: Tensor, codes: Tensor) -> Tensor:
    p = scores.softmax(-1)
    return ((F.one_hot(p.argmax(-1), len(codes)) + p - p.detach()) @ codes).square().mean()


def our_assignment(x: Tensor, codes: Tensor) -> Tensor:
    log_sum_exp, p = soft_assignment(x, codes, metric="dot")
    return log_sum_exp.mean() + p.square().sum()


WITH_ALL_CODES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "codes drawn": (
        lambda x, codes: draw_codes(x, codes, temperature=1.0, seed=0),
        lambda x, codes: drawn(F.normalize(x, dim=-1) @ codes.T),
    ),
    "soft assignment": (our_assignment, lambda x, codes: dense_assignment(x @ codes.T)),
    "entropies": (
        lambda x, codes: -torch.stack(entropies(x, codes, metric="dot")).diff().sum(),
        lambda x, codes: dense_entropies(x @ codes.T),
    ),
    "index backpropagation": (
        lambda x, codes: index_backpropagation(x, codes)[0].square().mean(),
        lambda x, codes: dense_index_backpropagation(x @ codes.T, codes),
    ),
}


@pytest.mark.parametrize("what", WITH_ALL_CODES)
def test_with_all_codes(benchmark, what):
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(n, D, generator=generator).to(DEVICE).requires_grad_(what != "codes drawn") for n in (N, K))

    def run(value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        out = value(x, codes)
        return torch.cat(torch.autograd.grad(out, (x, codes))) if out.requires_grad else out

    ours, dense = (partial(run, value) for value in WITH_ALL_CODES[what])
    measure_in_turns(benchmark, f"{what} N={N} K={K} D={D}", {OURS: ours, "torch, N x K": dense}, rounds=ROUNDS)
