"""The definition of codebook_update in plain PyTorch, down to the bits: every version returns exactly these.

Sums of integers do not depend on their order, so whatever is summed is an integer. Where a floating-point result is
needed, it is one correctly rounded operation on doubles whose inputs are short enough (24 bits for both factors of a
product) that a fused multiply-add changes nothing.
"""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor

UNIT = 2.0**36  # cosine: |y| <= 1 in steps of 2^-36; a sum holds 2^27 vectors (134 million, over all ranks)
# Euclidean: steps of 2^-4 hold |x| < 2^32 for 2^27 vectors, and steps of 2^-40 hold what the first leave.
COARSE, FINE, LARGEST = 2.0**4, 2.0**40, 2.0**32
SQUARE = 2.0**46  # squares below 4 in steps of 2^-46: a sum holds 2^15 of them, the largest D
SIZE = 2.0**30  # cluster sizes in steps of 2^-30: their total holds 2^33 vectors
EPS = 1e-12  # of l2(), as in torch.nn.functional.normalize


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] fp32 -> (l2(x) in fp64, before its rounding to fp32; finite [N] bool). Not finite rows are zero."""
    largest = x.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    x, largest = torch.where(finite, x, 0).double(), torch.where(finite, largest, 0).double()
    down = ((2046 << 52) - (largest.view(torch.int64) & (2047 << 52))).view(torch.float64)  # 2^-e, 2^e <= largest
    x = x * down  # exact; the largest is now in [1, 2)
    squares = (x.square() * SQUARE).round().long().sum(-1, keepdim=True)
    norm = (squares.double().sqrt() / SQUARE**0.5).maximum(EPS * down)
    return x * (1 / norm).float().double(), finite[:, 0]


def codebook_statistics_reference(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> Tensor:
    """How many vectors chose a code, and their sums: int64 [K, 1 + D] for cosine, [K, 1 + 2 D] for euclidean."""
    x = x.float()
    if metric == "cosine":
        y, counted = unit_rows(x)
        limbs = [(y * UNIT).round()]
    else:
        counted = (x.abs() < LARGEST).all(-1)  # false for NaN
        y = torch.where(counted[:, None], x, 0).double()
        coarse = (y * COARSE).round()
        limbs = [coarse, ((y - coarse / COARSE) * FINE).round()]
    rows = torch.cat([counted[:, None].double(), *limbs], dim=1).long()
    inside = (indices >= 0) & (indices < num_codes)
    rows = torch.where(inside[:, None], rows, 0)
    return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, indices.clamp(0, num_codes - 1), rows)


def unpack_statistics(statistics: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """bins [K] int64 and sums [K, D] float64."""
    bins, sums = statistics[:, 0], statistics[:, 1:]
    if metric == "cosine":
        return bins, sums.double() / UNIT
    coarse, fine = sums.chunk(2, dim=1)
    return bins, coarse.double() / COARSE + fine.double() / FINE


def fp32(value: float) -> float:
    return c_float(value).value


def mix(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """decay * old + (1 - decay) * new in fp32; the factors are rounded to fp32 first."""
    return (fp32(decay) * old.double() + fp32(1 - decay) * new.double()).float()


def l2(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) of fp32 rows, NaN where a row is not finite."""
    y, finite = unit_rows(x)
    return torch.where(finite[:, None], y, torch.nan).float()


def total_size(cluster_size: Tensor) -> Tensor:
    """The sum of the cluster sizes, float64, whatever its order."""
    return (cluster_size.double() * SIZE).round().long().sum().double() / SIZE


def apply_statistics_reference(
    statistics: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    decay: float,
    metric: str,
    eps: float,
) -> Tensor:
    """The second pass, in place on the fp32 state: codebook, embed_avg [K, D], cluster_size [K]. Returns bins [K]."""
    bins, sums = unpack_statistics(statistics, metric)
    cluster_size.copy_(mix(cluster_size, bins.float(), decay))
    if embed_avg is None:
        mean = l2((sums * (1 / bins.clamp(min=1).double())[:, None]).float())
        codebook.copy_(l2(mix(codebook, torch.where((bins > 0)[:, None], mean, codebook), decay)))
    else:
        embed_avg.copy_(mix(embed_avg, sums.float(), decay))
        total = total_size(cluster_size)
        smoothed = (cluster_size.double() + fp32(eps)) / (total + len(bins) * fp32(eps)) * total
        codes = (embed_avg.double() * (1 / smoothed)[:, None]).float()
        codes = l2(codes) if metric == "cosine" else codes
        codebook.copy_(torch.where((smoothed > 0)[:, None], codes, codebook))
    return bins.clone()
