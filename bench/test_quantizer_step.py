"""A training step of the whole quantizer (forward, backward, codebook update) beside what people run today."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.kernels import codebook_update, vector_quantize
from bench.harness import DEVICE, OURS, measure
from bench.test_codebook_search import D, K, N, problem
from bench.test_codebook_update import DECAY, one_hot_update

GROUP = f"quantizer training step N={N} K={K} D={D}"
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [N, D] -> quantized, loss


def ours(codebook: Tensor) -> Forward:
    quantizer = FusedVectorQuantizer(*codebook.shape, kmeans_init=False, dead_after=0).to(DEVICE).train()
    quantizer.codebook.copy_(codebook)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        out = quantizer(x)
        return out.quantized, out.loss

    return forward


def only_ops(codebook: Tensor) -> Forward:
    """vector_quantize and codebook_update, without the module's usage statistics."""
    codebook, cluster_size = codebook.clone(), torch.zeros(len(codebook), device=DEVICE)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        out = vector_quantize(x, codebook)
        codebook_update(codebook, cluster_size, x.detach(), out.indices, decay=DECAY)
        return out.quantized, out.loss

    return forward


def reference_structure(codebook: Tensor) -> Forward:
    """What the reference implementation does: N x K squared distances, argmin, N x K one-hot, two matrix products."""
    codebook, cluster_size = codebook.clone(), torch.zeros(len(codebook), device=DEVICE)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.normalize(x, dim=-1)
        distances = y.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * y @ codebook.T
        indices = distances.argmin(1)
        codes = F.embedding(indices, codebook)
        with torch.no_grad():
            one_hot_update(codebook, cluster_size, y, indices)
        return y + (codes - y).detach(), F.mse_loss(codes.detach(), y)

    return forward


def vector_quantize_pytorch(codebook: Tensor) -> Forward:
    vq = pytest.importorskip(
        "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra: bench)"
    )
    K, D = codebook.shape
    module = vq.VectorQuantize(dim=D, codebook_size=K, use_cosine_sim=True, decay=DECAY, threshold_ema_dead_code=0)
    module = module.to(DEVICE).train()
    module._codebook.embed.data.copy_(codebook[None])

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = module(x[None])
        return quantized[0], loss.sum()

    return forward


IMPLEMENTATIONS: dict[str, Callable[[Tensor], Forward]] = {
    OURS: ours,
    "beitv2_fast.kernels, only the ops": only_ops,
    "reference implementation's structure": reference_structure,
    "vector-quantize-pytorch": vector_quantize_pytorch,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_quantizer_step(benchmark, name):
    x, codebook = problem()
    x.requires_grad_()
    upstream = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    forward = IMPLEMENTATIONS[name](codebook)

    def step() -> Tensor:
        quantized, loss = forward(x)
        return torch.autograd.grad(loss + (quantized * upstream).sum(), x)[0]

    measure(benchmark, GROUP, name, step)
