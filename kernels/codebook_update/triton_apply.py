"""The second pass of codebook_update on a GPU: row by row, after the sizes' total where averages are smoothed by it.

Bytes: 8 K (1 + D) of statistics read (twice that for euclidean), 4 K D of every state tensor read and written; these
bound it. The arithmetic is reference.py's, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_statistics import INTEGER_ROUND, unit_factors

EXACT = tl.constexpr(1099511627776.0)  # 2^40: an fp32 number of steps beyond is a whole number


@triton.jit
def wide(scalar):
    """An argument in fp64, exactly: floats are passed as fp32 numbers."""
    return tl.zeros([1], tl.float64) + scalar


@triton.jit
def move_sizes(number, cluster_size, bins, offs_k, mask, decay, rest):
    """bins and cluster_size, which is returned."""
    tl.store(bins + offs_k, number, mask=mask)
    old = tl.load(cluster_size + offs_k, mask=mask, other=0.0).to(tl.float64)
    new = number.to(tl.float32).to(tl.float64)
    moved = (old * wide(decay) + new * wide(rest)).to(tl.float32)
    tl.store(cluster_size + offs_k, moved, mask=mask)
    return moved


@triton.jit
def sizes_kernel(statistics, cluster_size, bins, totals, K, WIDTH, decay, rest, BLOCK_K: tl.constexpr):
    """``move_sizes`` and their total in steps of 2^-30, before the codes that need it. The second axis of the grid is
    that of several codebooks."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    offs_k += tl.program_id(1) * K
    number = tl.load(statistics + offs_k.to(tl.int64) * WIDTH, mask=mask, other=0)
    steps = move_sizes(number, cluster_size, bins, offs_k, mask, decay, rest).to(tl.float64) * 1073741824.0
    steps = tl.where(steps < EXACT, (steps + INTEGER_ROUND) - INTEGER_ROUND, steps).to(tl.int64)
    tl.atomic_add(totals + tl.program_id(1), tl.sum(tl.where(mask, steps, 0), axis=0), sem="relaxed")


@triton.jit
def l2_rows(rows):
    """fp32 rows [R, C], NaN where a row is not finite."""
    factor, finite = unit_factors(rows)
    return tl.where(finite[:, None], (rows.to(tl.float64) * factor[:, None]).to(tl.float32), float("nan"))


@triton.jit
def mix_rows(old, new, decay, rest):
    return (old.to(tl.float64) * wide(decay) + new.to(tl.float64) * wide(rest)).to(tl.float32)


@triton.jit
def codes_kernel(
    statistics,
    totals,
    codebook,
    cluster_size,
    embed_avg,
    bins,
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
    """codebook and embed_avg; without that, which needs no total, cluster_size and bins, too. The second axis of the
    grid is that of several codebooks."""
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_k = offs_k < K
    offs_k += tl.program_id(1) * K
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
        total = tl.load(totals + tl.program_id(1)).to(tl.float64) * (1.0 / 1073741824.0)
        average = mix_rows(tl.load(embed_avg + at, mask=mask, other=0.0), sums.to(tl.float32), decay, rest)
        smoothed = (size.to(tl.float64) + wide(eps)) / (total + wide(K) * wide(eps)) * total
        moved = (average.to(tl.float64) * (1.0 / smoothed)[:, None]).to(tl.float32)
        if COSINE:
            moved = l2_rows(moved)
        code = tl.where((smoothed > 0)[:, None], moved, code)
    else:
        move_sizes(number, cluster_size, bins, offs_k, mask_k, decay, rest)
        inverse = 1.0 / tl.maximum(number, 1).to(tl.float64)
        mean = l2_rows((sums * inverse[:, None]).to(tl.float32))
        code = l2_rows(mix_rows(code, tl.where((number > 0)[:, None], mean, code), decay, rest))
    tl.store(codebook + at, code, mask=mask)
    if AVERAGE:
        tl.store(embed_avg + at, average, mask=mask)


@triton.jit
def counts_kernel(bins, idle, window, steps, K, BLOCK_K: tl.constexpr):
    """Counters of all codes after a step; the second axis of the grid is that of several codebooks.

    Every program adds up the bins of all codes, 8 K bytes from the second-level cache, which is one launch less.
    """
    start = tl.program_id(1).to(tl.int64) * K
    offs = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.int64)
    for first in range(0, K, BLOCK_K):
        total += tl.load(bins + start + first + offs, mask=first + offs < K, other=0)
    offs_k = tl.program_id(0) * BLOCK_K + offs
    mask, at = offs_k < K, start + offs_k
    number = tl.load(bins + at, mask=mask, other=0)
    unused = tl.load(idle + at, mask=mask, other=0) + tl.sum(total, axis=0)
    tl.store(idle + at, tl.where(number > 0, 0, unused), mask=mask)
    if window is not None:
        tl.store(window + at, tl.load(window + at, mask=mask, other=0) + number, mask=mask)
    if steps is not None:
        tl.store(steps, tl.load(steps) + 1, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
