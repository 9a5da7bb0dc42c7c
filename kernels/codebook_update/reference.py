"""The definition of codebook_update in plain PyTorch, with sums in fixed point so that their order does not matter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Two int64 limbs a number: steps of 2^-4 hold |x| < 2^32 for 2^27 vectors, steps of 2^-40 hold what the first leaves.
COARSE, FINE = 2.0**4, 2.0**40


def batch_statistics_reference(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> Tensor:
    """One flat int64 buffer [K, 1 + 2 D] to be summed over ranks: how many vectors chose a code, and their sums."""
    x = (F.normalize(x.float(), dim=-1) if metric == "cosine" else x.float()).double()
    finite = x.isfinite().all(-1) & (x.abs() < 2.0**32).all(-1)
    x = torch.where(finite[:, None], x, 0)
    coarse = (x * COARSE).round()
    fine = ((x - coarse / COARSE) * FINE).round()
    rows = torch.cat([finite[:, None].double(), coarse, fine], dim=1).long()  # [N, 1 + 2 D]
    return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, indices, rows)


def unpack_statistics(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[K, 1 + 2 D] int64 -> bins [K] int64, sums [K, D] float64."""
    bins, coarse, fine = statistics.split([1, *[(statistics.shape[1] - 1) // 2] * 2], dim=1)
    return bins[:, 0], coarse.double() / COARSE + fine.double() / FINE


def norm_ema_reference(codebook: Tensor, cluster_size: Tensor, statistics: Tensor, decay: float) -> Tensor:
    """BEiT v2: a moving average on the sphere. Codes that nobody chose keep their direction."""
    bins, sums = unpack_statistics(statistics)
    cluster_size.lerp_(bins.to(cluster_size.dtype), 1 - decay)
    mean = F.normalize(sums / bins.clamp(min=1)[:, None], dim=-1).to(codebook.dtype)
    mean = torch.where((bins > 0)[:, None], mean, codebook)
    codebook.copy_(F.normalize(decay * codebook + (1 - decay) * mean, dim=-1))
    return bins


def ema_average_reference(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, statistics: Tensor, decay: float, metric: str, eps: float
) -> Tensor:
    """VQ-VAE: moving averages of counts and sums, whose ratio is the code."""
    bins, sums = unpack_statistics(statistics)
    cluster_size.lerp_(bins.to(cluster_size.dtype), 1 - decay)
    embed_avg.lerp_(sums.to(embed_avg.dtype), 1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + eps) / (total + codebook.shape[0] * eps) * total
    codes = embed_avg / smoothed[:, None]
    codebook.copy_(F.normalize(codes, dim=-1) if metric == "cosine" else codes)
    return bins
