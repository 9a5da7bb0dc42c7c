"""The launches of codebook_update's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import cdiv, device_of, next_power_of_2
from .reference import fp32
from .triton_apply import codes_kernel, counts_kernel, sizes_kernel
from .triton_statistics import statistics_kernel

APPLY_TILE = 512  # elements per program of the second pass: 4 per lane
NUM_WARPS = 2 if torch.version.hip else 4  # 4 elements per lane: loads of 16 bytes


def tile_shape(dim: int, elements: int = 1024) -> tuple[int, int]:
    """Rows and columns of a program's tile. More elements than 1024 would cost occupancy."""
    block_d = next_power_of_2(dim)
    return min(32, max(1, elements // block_d)), block_d


def codebook_statistics_triton(x: Tensor, indices: Tensor, num_codes: int, metric: str, groups: int = 1) -> Tensor:
    count, dim = x.shape
    cosine = metric == "cosine"
    out = torch.zeros(groups * num_codes, 1 + (dim if cosine else 2 * dim), dtype=torch.int64, device=x.device)
    if count == 0:
        return out
    block_n, block_d = tile_shape(dim)
    with device_of(x):
        statistics_kernel[(cdiv(count, block_n),)](
            x,
            indices,
            out,
            count,
            num_codes,
            groups,
            *x.stride(),
            indices.stride(0),
            D=dim,
            COSINE=cosine,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out


def apply_statistics_triton(
    statistics: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    decay: float,
    metric: str,
    eps: float,
) -> Tensor:
    """All tensors contiguous."""
    (count, dim), groups = codebook.shape[-2:], codebook.shape[:-2].numel()
    decay, rest, eps = fp32(decay), fp32(1 - decay), fp32(eps)
    bins, totals = statistics.new_empty(groups * count), None
    block_k, block_d = tile_shape(dim, APPLY_TILE)
    with device_of(codebook):
        if embed_avg is not None:
            totals = statistics.new_zeros(groups)
            sizes_kernel[(cdiv(count, 256), groups)](
                statistics, cluster_size, bins, totals, count, statistics.shape[1], decay, rest, BLOCK_K=256
            )
        codes_kernel[(cdiv(count, block_k), groups)](
            statistics,
            totals,
            codebook,
            cluster_size,
            embed_avg,
            bins,
            count,
            decay,
            rest,
            eps,
            D=dim,
            COSINE=metric == "cosine",
            AVERAGE=embed_avg is not None,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=NUM_WARPS * min(max(block_d // APPLY_TILE, 1), 4),
        )
    return bins


def count_uses_triton(bins: Tensor, idle: Tensor, window: Tensor | None, steps: Tensor | None) -> None:
    """All tensors contiguous."""
    count = bins.shape[-1]
    with device_of(bins):
        counts_kernel[(cdiv(count, 1024), bins.numel() // count)](bins, idle, window, steps, count, BLOCK_K=1024)
