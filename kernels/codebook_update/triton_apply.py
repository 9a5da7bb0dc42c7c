"""The second pass of codebook_update on a GPU: sizes and their totals, then everything else row by row.

Bytes: 8 K (1 + D) of statistics read (twice that for euclidean), 4 K D of every state tensor read and written; these
bound it. The arithmetic is reference.py's, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import fp32
from .triton_kernel import INTEGER_ROUND, device_of, tile, unit_factors

EXACT = tl.constexpr(1099511627776.0)  # 2^40: an fp32 number of steps beyond is a whole number
TILE = 512  # elements of a program: 4 a lane
NUM_WARPS = 2 if torch.version.hip else 4  # 4 elements a lane: loads of 16 bytes


@triton.jit
def wide(scalar):
    """An argument in fp64, exactly: floats are passed as fp32 numbers."""
    return tl.zeros([1], tl.float64) + scalar


@triton.jit
def sizes_kernel(statistics, cluster_size, bins, totals, K, WIDTH, decay, rest, BLOCK_K: tl.constexpr):
    """cluster_size, its total in steps of 2^-30, and bins."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    number = tl.load(statistics + offs_k.to(tl.int64) * WIDTH, mask=mask, other=0)
    tl.store(bins + offs_k, number, mask=mask)
    old = tl.load(cluster_size + offs_k, mask=mask, other=0.0).to(tl.float64)
    new = number.to(tl.float32).to(tl.float64)
    moved = (old * wide(decay) + new * wide(rest)).to(tl.float32)
    tl.store(cluster_size + offs_k, moved, mask=mask)
    steps = moved.to(tl.float64) * 1073741824.0
    steps = tl.where(steps < EXACT, (steps + INTEGER_ROUND) - INTEGER_ROUND, steps).to(tl.int64)
    tl.atomic_add(totals, tl.sum(tl.where(mask, steps, 0), axis=0), sem="relaxed")


@triton.jit
def l2(rows):
    """fp32 rows [R, C], NaN where a row is not finite."""
    factor, finite = unit_factors(rows)
    return tl.where(finite[:, None], (rows.to(tl.float64) * factor[:, None]).to(tl.float32), float("nan"))


@triton.jit
def mix(old, new, decay, rest):
    return (old.to(tl.float64) * wide(decay) + new.to(tl.float64) * wide(rest)).to(tl.float32)


@triton.jit
def codes_kernel(
    statistics,
    totals,
    codebook,
    cluster_size,
    embed_avg,
    K,
    decay,
    rest,
    eps,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_k = offs_k < K
    mask = mask_k[:, None] & (offs_d < D)[None, :]
    WIDTH: tl.constexpr = 1 + D if COSINE else 1 + 2 * D
    number = tl.load(statistics + offs_k * WIDTH, mask=mask_k, other=0)
    first = statistics + offs_k[:, None] * WIDTH + 1 + offs_d[None, :]
    if COSINE:
        sums = tl.load(first, mask=mask, other=0).to(tl.float64) * (1.0 / 68719476736.0)
    else:
        sums = tl.load(first, mask=mask, other=0).to(tl.float64) * 0.0625
        sums += tl.load(first + D, mask=mask, other=0).to(tl.float64) * (1.0 / 1099511627776.0)
    at = offs_k[:, None] * D + offs_d[None, :]
    code = tl.load(codebook + at, mask=mask, other=0.0)
    if AVERAGE:
        size = tl.load(cluster_size + offs_k, mask=mask_k, other=0.0)
        total = tl.load(totals).to(tl.float64) * (1.0 / 1073741824.0)
        average = mix(tl.load(embed_avg + at, mask=mask, other=0.0), sums.to(tl.float32), decay, rest)
        smoothed = (size.to(tl.float64) + wide(eps)) / (total + wide(K) * wide(eps)) * total
        moved = (average.to(tl.float64) * (1.0 / smoothed)[:, None]).to(tl.float32)
        if COSINE:
            moved = l2(moved)
        code = tl.where((smoothed > 0)[:, None], moved, code)
    else:
        inverse = 1.0 / tl.maximum(number, 1).to(tl.float64)
        mean = l2((sums * inverse[:, None]).to(tl.float32))
        code = l2(mix(code, tl.where((number > 0)[:, None], mean, code), decay, rest))
    tl.store(codebook + at, code, mask=mask)
    if AVERAGE:
        tl.store(embed_avg + at, average, mask=mask)


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
    count, dim = codebook.shape
    decay, rest, eps = fp32(decay), fp32(1 - decay), fp32(eps)
    bins = statistics.new_empty(count)
    totals = statistics.new_zeros(1)
    block_k, block_d = tile(dim, TILE)
    with device_of(codebook):
        sizes_kernel[(triton.cdiv(count, 256),)](
            statistics, cluster_size, bins, totals, count, statistics.shape[1], decay, rest, BLOCK_K=256
        )
        codes_kernel[(triton.cdiv(count, block_k),)](
            statistics,
            totals,
            codebook,
            cluster_size,
            embed_avg,
            count,
            decay,
            rest,
            eps,
            D=dim,
            COSINE=metric == "cosine",
            AVERAGE=embed_avg is not None,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=NUM_WARPS * min(max(block_d // TILE, 1), 4),
        )
    return bins
