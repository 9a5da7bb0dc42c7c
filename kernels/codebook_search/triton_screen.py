"""GPU search, first half: score all codes in fp16 on the tensor cores and keep the few groups a row may need.

``pack_codebook`` rounds the codebook to fp16 once; ``screen`` streams it past blocks of rows. A group is the
BLOCK_K / LANES codes of one block that share a lane (index modulo LANES). For every row and lane the two best groups
survive, as a score whose low mantissa bits hold the block's number, and the third best score bounds what was dropped.
``triton_resolve`` scores the groups that may hold the nearest code again, exactly.

Costs of ``screen`` for N rows, K codes, D dimensions: 2 N K D tensor-core FLOPs; 1 + 4 / group size maxima per score
(no index is carried along); reads the packed codebook (2 K D bytes, from L2) once per block of rows, writes
4 N SPLIT (2 LANES + 1) bytes. Bound by the maxima for D <= 64, by the tensor cores above.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two_scale(largest):
    """The power of two that brings ``largest`` (fp32, >= 0) into [1, 4), or as near to it as fp32 allows."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """|x|, with Inf in place of NaN, which maxima would ignore."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def load_rows(rows, mask_rows, start, D, stride_d, BLOCK_D: tl.constexpr):
    """Columns start .. start + BLOCK_D of some rows, zero beyond D, as fp32."""
    offs_d = start + tl.arange(0, BLOCK_D)
    mask = mask_rows[:, None] & (offs_d < D)[None, :]
    return tl.load(rows[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_scale(
    rows, mask_rows, codebook_scale, D, stride_d, EUCLIDEAN: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr
):
    """(scale, largest magnitude) of every row of x: the scale is applied before the row is rounded to fp16.

    Euclidean scores add a code's norm in units of scale * codebook scale: not above the codebook's, it cannot overflow.
    """
    largest = tl.zeros(mask_rows.shape, tl.float32)
    for chunk in range(NUM_D):
        x = load_rows(rows, mask_rows, chunk * BLOCK_D, D, stride_d, BLOCK_D)
        largest = tl.maximum(largest, tl.max(magnitude(x), axis=1))
    scale = power_of_two_scale(largest)
    if EUCLIDEAN:
        scale = tl.minimum(scale, codebook_scale)
    return scale, largest


@triton.jit
def codebook_magnitude(
    codebook, bounds, K, D, stride_k, stride_d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr
):
    """bounds[0] = largest |value| of the codebook (Inf if any is not finite)."""
    offs_k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, mask = codebook + offs_k.to(tl.int64) * stride_k, offs_k < K
    largest = tl.zeros((BLOCK_R,), tl.float32)
    for chunk in range(NUM_D):
        values = load_rows(rows, mask, chunk * BLOCK_D, D, stride_d, BLOCK_D)
        largest = tl.maximum(largest, tl.max(magnitude(values), axis=1))
    tl.atomic_max(bounds, tl.max(largest, axis=0))


@triton.jit
def pack_codebook(
    codebook,
    packed,
    bias,
    bounds,
    K,
    D,
    stride_k,
    stride_d,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):
    """Round scaled codes to fp16 in [K to a whole block, D to a whole chunk] and measure what that loses.

    bias[k] = -||scale c_k||^2 / 2. bounds[1..3] = maxima over codes of ||scale c||, of ||scale c - packed c|| and of
    -bias. Codes beyond K repeat one of their own lane in the last block, so they never raise a group's best score; in
    a block of fewer than LANES codes they repeat a neighbor's, which costs a candidate, not the answer.
    """
    offs_k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    last_start = (K - 1) // BLOCK_K * BLOCK_K
    stand_in = last_start + (offs_k - last_start) % LANES % (K - last_start)
    rows = codebook + tl.where(offs_k < K, offs_k, stand_in).to(tl.int64) * stride_k
    everywhere = offs_k >= 0
    scale = power_of_two_scale(tl.load(bounds))
    squares = tl.zeros((BLOCK_R,), tl.float32)
    losses = tl.zeros((BLOCK_R,), tl.float32)
    for chunk in range(NUM_D):
        values = load_rows(rows, everywhere, chunk * BLOCK_D, D, stride_d, BLOCK_D) * scale
        rounded = values.to(tl.float16)
        loss = values - rounded.to(tl.float32)
        squares += tl.sum(values * values, axis=1)
        losses += tl.sum(loss * loss, axis=1)
        offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(packed + offs_k.to(tl.int64)[:, None] * (BLOCK_D * NUM_D) + offs_d[None, :], rounded)
    tl.store(bias + offs_k, -0.5 * squares)
    tl.atomic_max(bounds + 1, tl.sqrt(tl.max(squares, axis=0)))
    tl.atomic_max(bounds + 2, tl.sqrt(tl.max(losses, axis=0)))
    tl.atomic_max(bounds + 3, tl.max(0.5 * squares, axis=0))


@triton.jit
def screen(
    x,
    packed,
    bias,
    bounds,
    keys,
    rest,
    N,
    D,
    num_blocks,
    x_stride_n,
    x_stride_d,
    EUCLIDEAN: tl.constexpr,
    POSITIVE: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):
    """keys [N, SPLIT, 2, LANES]: best and second best group of every lane; rest [N, SPLIT]: the best one dropped.

    POSITIVE adds to the scores of a row what makes all of them >= 0, whose bits order as integers do: AMD's integer
    maximum is one instruction, its float maximum three (both operands are quieted first).
    """
    part = tl.program_id(1)
    first = num_blocks * part // SPLIT
    last = num_blocks * (part + 1) // SPLIT
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = x + offs_n * x_stride_n
    codebook_scale = power_of_two_scale(tl.load(bounds))
    scale, _ = row_scale(rows, mask_n, codebook_scale, D, x_stride_d, EUCLIDEAN, BLOCK_D, NUM_D)
    ratio = scale / codebook_scale
    if NUM_D == 1:
        tile = (load_rows(rows, mask_n, 0, D, x_stride_d, BLOCK_D) * scale[:, None]).to(tl.float16)
    if POSITIVE:
        offset = score_offset(rows, mask_n, scale, ratio, bounds, D, x_stride_d, EUCLIDEAN, BLOCK_D, NUM_D)

    KEY: tl.constexpr = tl.int32 if POSITIVE else tl.float32
    best = tl.full((BLOCK_N, LANES), 0 if POSITIVE else -float("inf"), KEY)
    second = best
    third = best
    low_bits: tl.constexpr = (1 << INDEX_BITS) - 1
    offs_k, offs_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    codes = packed + (first * BLOCK_K + offs_k).to(tl.int64)[:, None] * (BLOCK_D * NUM_D) + offs_d[None, :]
    for block in range(0, last - first):
        scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if EUCLIDEAN:
            scores += tl.load(bias + (first + block) * BLOCK_K + offs_k)[None, :] * ratio[:, None]
        if POSITIVE:
            scores += offset[:, None]
        if NUM_D == 1:
            scores = tl.dot(tile, tl.load(codes).T, scores)
        else:
            for chunk in range(NUM_D):
                tile = load_rows(rows, mask_n, chunk * BLOCK_D, D, x_stride_d, BLOCK_D) * scale[:, None]
                scores = tl.dot(tile.to(tl.float16), tl.load(codes + chunk * BLOCK_D).T, scores)
        scores = scores.to(KEY, bitcast=True)
        group = tl.max(tl.reshape(scores, (BLOCK_N, BLOCK_K // LANES, LANES)), axis=1)
        key = ((group.to(tl.int32, bitcast=True) & ~low_bits) | block).to(KEY, bitcast=True)
        lower = tl.minimum(best, key)
        best = tl.maximum(best, key)
        third = tl.maximum(third, tl.minimum(second, lower))
        second = tl.maximum(second, lower)
        codes += BLOCK_K * BLOCK_D * NUM_D
    slots = keys + (offs_n[:, None] * SPLIT + part) * (2 * LANES) + tl.arange(0, LANES)[None, :]
    tl.store(slots, best.to(tl.float32, bitcast=True), mask=mask_n[:, None])
    tl.store(slots + LANES, second.to(tl.float32, bitcast=True), mask=mask_n[:, None])
    tl.store(rest + offs_n * SPLIT + part, tl.max(third, axis=1).to(tl.float32, bitcast=True), mask=mask_n)


@triton.jit
def score_offset(
    rows, mask_rows, scale, ratio, bounds, D, stride_d,
    EUCLIDEAN: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """A bound of |score| of every row: with it added, no score is negative."""
    squares = tl.zeros(mask_rows.shape, tl.float32)
    for chunk in range(NUM_D):
        x = load_rows(rows, mask_rows, chunk * BLOCK_D, D, stride_d, BLOCK_D) * scale[:, None]
        squares += tl.sum(x * x, axis=1)
    bound = 1.01 * tl.sqrt(squares) * tl.load(bounds + 1)
    if EUCLIDEAN:
        bound += 1.01 * tl.load(bounds + 3) * ratio
    return bound
