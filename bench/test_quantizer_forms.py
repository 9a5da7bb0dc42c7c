"""A training step of every form of the quantizer beside vector-quantize-pytorch's module of the same options.

Sizes: ``BENCH_N``, ``BENCH_K`` and ``BENCH_D`` (default 1,568, 2,048 and 32: seconds for all).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beitv2_fast import replace_quantizers
from beitv2_fast.kernels import codebook_search
from bench.harness import DEVICE, OURS, measure

N, K, D = (int(os.environ.get(f"BENCH_{name}", default)) for name, default in (("N", 1568), ("K", 2048), ("D", 32)))
PEER = "vector-quantize-pytorch"
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "learnt by gradient": ("VectorQuantize", LEARNABLE),
    "optimizer in place": ("VectorQuantize", {**LEARNABLE, "in_place_codebook_optimizer": torch.optim.Adam}),
    "stochastic": ("VectorQuantize", {"stochastic_sample_codes": True}),
    "diversity loss": ("VectorQuantize", {"codebook_diversity_loss_weight": 1.0}),
    "cross-entropy commitment": ("VectorQuantize", {"commitment_use_cross_entropy_loss": True}),
    "SimVQ": ("SimVQ", {}),
    "residual, 4 stages": ("ResidualVQ", {"num_quantizers": 4}),
    "residual, 4 stages, one codebook": ("ResidualVQ", {"num_quantizers": 4, "shared_codebook": True}),
    "residual SimVQ, 4 stages": ("ResidualSimVQ", {"num_quantizers": 4}),
    "2 groups of 4 stages": ("GroupedResidualVQ", {"num_quantizers": 4, "groups": 2}),
}


def step(module: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(8, N // 8, D, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()

    def run() -> Tensor:
        quantized, _, loss, *_ = module(x)
        return torch.autograd.grad(loss.sum() + quantized.square().sum(), x)[0]

    return run


@pytest.mark.parametrize("name", [OURS, PEER])
@pytest.mark.parametrize("form", FORMS)
def test_a_training_step(benchmark, form, name):
    package = pytest.importorskip("vector_quantize_pytorch", reason=f"{PEER} is not installed (extra: bench)")
    cls, options = FORMS[form]
    torch.manual_seed(0)
    module = getattr(package, cls)(dim=D, codebook_size=K, **options).to(DEVICE).train()
    module = replace_quantizers(copy.deepcopy(module)) if name == OURS else module
    measure(benchmark, f"{form} N={N} K={K} D={D}", name, step(module), seconds=0.2)


@pytest.mark.parametrize("name", [OURS, "torch cdist + topk"])
def test_the_four_nearest_codes(benchmark, name):
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(count, D, generator=generator).to(DEVICE) for count in (N, K))
    theirs = lambda: torch.cdist(x, codes).topk(4, largest=False).indices  # noqa: E731
    run = (lambda: codebook_search(x, codes, metric="euclidean", k=4).indices) if name == OURS else theirs
    measure(benchmark, f"4 nearest N={N} K={K} D={D}", name, run, seconds=0.2)
