"""Only the EMA step of the codebook, beside the one-hot form of published quantizers, and torch's own scatter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast.kernels import codebook_search, codebook_update
from bench.harness import DEVICE, OURS, measure
from bench.test_codebook_search import D, K, N, problem

GROUP = f"codebook_update N={N} K={K} D={D}"
DECAY = 0.99


def ours(codebook: Tensor, cluster_size: Tensor, x: Tensor, indices: Tensor) -> None:
    codebook_update(codebook, cluster_size, x, indices, decay=DECAY)


def _move(codebook: Tensor, cluster_size: Tensor, counts: Tensor, sums: Tensor) -> None:
    cluster_size.mul_(DECAY).add_(counts, alpha=1 - DECAY)
    mean = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
    mean = torch.where((counts > 0)[:, None], mean, codebook)
    codebook.copy_(F.normalize(DECAY * codebook + (1 - DECAY) * mean, dim=-1))


def one_hot_update(codebook: Tensor, cluster_size: Tensor, x: Tensor, indices: Tensor) -> None:
    """Counts and sums by an N x K matrix of zeros and ones, as in the reference implementation."""
    one_hot = F.one_hot(indices, len(codebook)).to(x.dtype)
    _move(codebook, cluster_size, one_hot.sum(0), (F.normalize(x, dim=-1).T @ one_hot).T)


def scatter_update(codebook: Tensor, cluster_size: Tensor, x: Tensor, indices: Tensor) -> None:
    """Counts by bincount, sums by index_add_ in fp32: what plain torch can do."""
    sums = torch.zeros_like(codebook).index_add_(0, indices, F.normalize(x, dim=-1))
    _move(codebook, cluster_size, torch.bincount(indices, minlength=len(codebook)), sums)


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    OURS: ours,
    "torch one_hot + matmul": one_hot_update,
    "torch bincount + index_add_": scatter_update,
}


@pytest.mark.parametrize("popular", [False, True], ids=["spread", "collapsed"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_codebook_update(benchmark, name, popular):
    """collapsed: nine of ten vectors chose one code, as when a codebook dies."""
    x, codebook = problem()
    indices = codebook_search(x, codebook).indices
    if popular:
        indices = torch.where(torch.arange(N, device=DEVICE) % 10 > 0, 7, indices)
    state, expected = ((codebook.clone(), torch.zeros(K, device=DEVICE)) for _ in range(2))
    IMPLEMENTATIONS[name](*state, x, indices)
    ours(*expected, x, indices)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    group = f"{GROUP}, one code of 9 in 10 vectors" if popular else GROUP
    measure(benchmark, group, name, lambda: IMPLEMENTATIONS[name](*state, x, indices))
