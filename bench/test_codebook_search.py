"""The search beside faiss, plain torch and vector-quantize-pytorch, on the default problem."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.kernels import codebook_search
from bench.harness import DEVICE, OURS, Unavailable, measure

N, K, D = 12_544, 8192, 32  # 64 images of 196 patches; the default codebook
GROUP = f"codebook_search N={N} K={K} D={D}"


def problem(n: int = N, k: int = K, d: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    return x.to(DEVICE), F.normalize(codebook, dim=-1).to(DEVICE)


def ours(x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: codebook_search(x, codebook).indices


def torch_matmul(x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: (F.normalize(x, dim=-1) @ codebook.T).argmax(-1)


def torch_cdist(x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.cdist(F.normalize(x, dim=-1), codebook).argmin(-1)


def faiss_flat(x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], torch.Tensor]:
    """IndexFlatIP with the codebook already added: its time holds no preparation of the codebook, ours does."""
    try:
        import faiss
    except ImportError:
        raise Unavailable("faiss-cpu is not installed (extra: bench)") from None
    if DEVICE.type != "cpu":
        raise Unavailable("faiss-cpu runs on the CPU")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def vector_quantize_pytorch(x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The eval forward of VectorQuantize(use_cosine_sim=True)."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        raise Unavailable("vector-quantize-pytorch is not installed (extra: bench)") from None
    module = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook), use_cosine_sim=True).to(DEVICE).eval()
    module._codebook.embed.data.copy_(codebook[None])
    batch = x[None]

    @torch.no_grad()
    def run() -> torch.Tensor:
        return module(batch)[1][0]

    return run


IMPLEMENTATIONS = {
    OURS: ours,
    "faiss IndexFlatIP": faiss_flat,
    "torch normalize + matmul + argmax": torch_matmul,
    "torch cdist + argmin": torch_cdist,
    "vector-quantize-pytorch eval forward": vector_quantize_pytorch,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_codebook_search(benchmark, name):
    x, codebook = problem()
    try:
        run = IMPLEMENTATIONS[name](x, codebook)
    except Unavailable as reason:
        pytest.skip(str(reason))
    agree = (run() == codebook_search(x, codebook).indices).double().mean().item()
    assert agree > 0.999, f"{name} does something else: only {agree:.2%} of its indices are the nearest codes"
    measure(benchmark, GROUP, name, run)
