"""k-means on the vectors of all ranks, on the ops codebook_search and codebook_update: the same bits on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import codebook_search, codebook_update
from ..kernels.sampling import directed, salt, sample_rows

ROUNDING = 1e-10  # a squared distance below this, relative to the vectors' mean square, is rounding


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    metric: str = "cosine",
    iterations: int = 10,
    seed: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster the rows of all ranks: Lloyd's iterations from a sample of the rows.

    A code that no vector chooses moves to a vector drawn in proportion to its squared distance from its own code, so
    duplicates of a code are never drawn. With fewer vectors than codes the remaining codes start beside vectors.

    Args:
        x: [N, D], this rank's rows; N may differ between ranks and be 0. Rows with NaN or Inf are left out.
        num_codes: K. metric: "cosine" (unit codes) or "euclidean". iterations: of assignment and mean.
        group: the name of the ranks' process group, by default the default one.

    Returns:
        (codebook [K, D] fp32, bins [K] int64: how many vectors chose each code in the last iteration). The bins are all
        zero when no rank has a vector; the codebook is then random.
    """
    codebook, found = sample_rows(x, num_codes, salt(seed, 0), directed(x) if metric == "cosine" else None, group)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_codes, x.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    # A mean over rows that every rank has in the same order: the same bits everywhere.
    scale = (codebook.square().sum() / (found.sum() * x.shape[1]).clamp(min=1)).sqrt()
    if metric == "cosine":
        codebook = F.normalize(codebook, dim=-1)
        scale = torch.full_like(scale, x.shape[1] ** -0.5)
    spread = codebook[torch.arange(num_codes, device=x.device) % found.sum().clamp(min=1)] + 0.01 * scale * noise
    codebook = torch.where(found[:, None], codebook, torch.where(found.any(), spread, noise))
    if metric == "cosine":
        codebook = F.normalize(codebook, dim=-1)
    bins = torch.zeros(num_codes, dtype=torch.int64, device=x.device)
    for iteration in range(iterations):
        codebook, bins = _iterate(x, codebook, metric, scale, salt(seed, 1 + iteration), group)
    return codebook, bins


def _iterate(
    x: Tensor, codebook: Tensor, metric: str, scale: Tensor, salt: int | Tensor, group: str | None
) -> tuple[Tensor, Tensor]:
    """One assignment, the means, and a new start for the codes that nobody chose."""
    search = codebook_search(x, codebook, metric=metric, return_distances=True)
    moved, sizes = codebook.clone(), torch.zeros(len(codebook), dtype=torch.float32, device=x.device)
    # With decay 0 the EMA step is the k-means step: codes become the means of their vectors.
    sums = torch.zeros_like(codebook) if metric == "euclidean" else None
    options: dict[str, Any] = {"metric": metric, "embed_avg": sums, "process_group": group}
    bins = codebook_update(moved, sizes, x, search.indices, decay=0.0, eps=1e-12, **options)
    empty = bins == 0
    assert search.distances is not None
    weights = search.distances.double()
    weights = torch.where(weights > ROUNDING * scale.double().square() * x.shape[1], weights, 0.0)
    if metric == "cosine":
        weights = weights * directed(x)
    rows, found = sample_rows(x, len(codebook), salt, weights, group)
    turn = (empty.cumsum(0) - 1).clamp(min=0)  # the i-th empty code takes the i-th drawn row
    fresh = F.normalize(rows[turn], dim=-1) if metric == "cosine" else rows[turn]
    kept = torch.where((empty & found[turn])[:, None], fresh, codebook)
    return torch.where(empty[:, None], kept, moved), bins
