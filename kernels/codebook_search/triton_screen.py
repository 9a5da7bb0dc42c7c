"""GPU search, first half: score all codes in fp16 on the tensor cores and keep the few groups a row may need.

``pack_codebook`` rounds the codebook to fp16 once; ``screen`` streams it past blocks of rows. A group is the
BLOCK_K / LANES codes of one block that share a lane (index modulo LANES). For every row and lane the two best groups
survive, as a score whose low mantissa bits hold the block's number, and the third best score bounds what was dropped.
``triton_resolve`` scores the groups that may hold the nearest code again, exactly.

Costs of ``screen`` for N rows, K codes, D dimensions: 2 N K D tensor-core FLOPs; reads the packed codebook (2 K D
bytes, from L2) once per block of rows, writes 4 N SPLIT (2 LANES + 1) bytes. On sm_90 at D = 32 a lane has 98
instructions per 64 scores, 52 of them maxima (no index is carried along), of which a multiprocessor issues two warps'
per cycle; and 500 per program, with two trips to memory before the first product. Bound by the maxima for D <= 64 where
a multiprocessor's programs hide these trips, by the tensor cores above.
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
def in_turn(groups):
    """(group, block): for which of the codebooks [groups, K, D] this program works, and on which block of it or of its
    rows. Row r belongs to codebook r % groups: the heads of a vector lie side by side."""
    return tl.program_id(0) % groups, tl.program_id(0) // groups


@triton.jit
def rows_of(group, block, groups, BLOCK: tl.constexpr):
    """The rows of a codebook's block, int64."""
    return (tl.full((), BLOCK, tl.int64) * block + tl.arange(0, BLOCK)) * groups + group


@triton.jit
def frame_of(center, bounds, group, num_blocks, D):
    """Where the center and the bounds of a codebook lie: centers in whole chunks of 128, the widest of any kernel."""
    return center + group * ((D + 127) // 128 * 128), bounds + group * (4 * num_blocks + 8)


@triton.jit
def load_rows(rows, mask_rows, start, D, stride_d, BLOCK_D: tl.constexpr):
    """Columns start .. start + BLOCK_D of some rows, zero beyond D, as fp32."""
    offs_d = start + tl.arange(0, BLOCK_D)
    mask = mask_rows[:, None] & (offs_d < D)[None, :]
    return tl.load(rows[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_centered(rows, mask_rows, center, before, shift, start, D, stride_d, BLOCK_D: tl.constexpr):
    """As ``load_rows``, of what is screened: before x - shift center."""
    x = load_rows(rows, mask_rows, start, D, stride_d, BLOCK_D) * before[:, None]
    return x - shift[:, None] * tl.load(center + start + tl.arange(0, BLOCK_D))[None, :]


@triton.jit
def row_frame(
    rows, mask_rows, center, bounds, D, stride_d, EUCLIDEAN: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr
):
    """(before, shift, scale, weight, largest magnitude) of every row of x.

    Screened is (before x - shift center) scale, rounded to fp16, plus weight bias. Euclidean: x - center, whose scale
    is not above the codebook's, so that a bias cannot overflow. Cosine, in a cone: x without its part along the center.
    """
    largest = tl.zeros(mask_rows.shape, tl.float32)
    shift = tl.zeros(mask_rows.shape, tl.float32)
    if EUCLIDEAN:
        before, shift = shift + 1.0, shift + 1.0
        for chunk in range(NUM_D):
            x = load_centered(rows, mask_rows, center, before, shift, chunk * BLOCK_D, D, stride_d, BLOCK_D)
            largest = tl.maximum(largest, tl.max(magnitude(x), axis=1))
        scale = tl.minimum(power_of_two_scale(largest), tl.load(bounds))
        weight = scale / tl.load(bounds)
    else:
        for chunk in range(NUM_D):
            x = load_rows(rows, mask_rows, chunk * BLOCK_D, D, stride_d, BLOCK_D)
            largest = tl.maximum(largest, tl.max(magnitude(x), axis=1))
        before = power_of_two_scale(largest)
        scale = shift + 1.0
        if tl.load(bounds + 1) > 0:
            for chunk in range(NUM_D):
                x = load_rows(rows, mask_rows, chunk * BLOCK_D, D, stride_d, BLOCK_D) * before[:, None]
                shift += tl.sum(x * tl.load(center + chunk * BLOCK_D + tl.arange(0, BLOCK_D))[None, :], axis=1)
            shift = shift / tl.load(bounds + 2)
            away = tl.zeros(mask_rows.shape, tl.float32)
            for chunk in range(NUM_D):
                x = load_centered(rows, mask_rows, center, before, shift, chunk * BLOCK_D, D, stride_d, BLOCK_D)
                away = tl.maximum(away, tl.max(tl.abs(x), axis=1))
            scale = tl.minimum(power_of_two_scale(away), 4096.0)
        weight = shift * scale
    return before, shift, scale, weight, largest


@triton.jit
def sample_center(sample):
    """About the mean of the codes, from some of them [S, BLOCK_D]; 0 where it is so large that codes minus it could
    overflow. Any center leaves the nearest code the nearest."""
    mean = tl.sum(tl.where(tl.abs(sample) < float("inf"), sample, 0.0) * (1.0 / sample.shape[0]), axis=0)
    return tl.where(tl.abs(mean) < 2.0**100, mean, 0.0)


@triton.jit
def stand_ins(ids, usable, other, LANES: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each code of a block the one that is packed in its place: itself; if it is not usable, the first usable one
    of its group, whose best score that cannot change; else one of the block; else ``other``."""
    of_group = tl.min(tl.reshape(tl.where(usable, ids, 2**31 - 1), (BLOCK_K // LANES, LANES)), axis=0)
    of_block = tl.min(of_group, axis=0)
    of_group = tl.where(of_group < 2**31 - 1, of_group, tl.minimum(of_block, other))
    spread = tl.reshape(tl.broadcast_to(of_group[None, :], (BLOCK_K // LANES, LANES)), (BLOCK_K,))
    return tl.where(usable, ids, spread)


@triton.jit
def pack_codebook(
    codebook,
    packed,
    bias,
    center,
    bounds,
    hard,
    N,
    K,
    D,
    num_blocks,
    groups,
    stride_k,
    stride_d,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAMPLE: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):
    """Round the codes minus ``center``, scaled, to fp16 in [K to a whole block, D to a whole chunk].

    <x, c - m> orders the codes of a row as <x, c> does, and <x - m, c - m> - ||c - m||^2 / 2 as the distance; both
    differ more, relative to their size, where the codes lie close together. In a cone, where ||m|| > 4 ||c - m||, rows
    lie along m, too, and <x, c - m> = <x - t m, c - m> + t <m, c - m> with any t: short vectors again, and fp32. Center
    m and scale come from SAMPLE codes, so that every program finds them alone; fp16 leaves room for codes 2^13 times as
    large, and beyond them, or where no sampled code is finite, nothing is screened. Codes that are not finite, or
    beyond K, repeat another.

    center: m; for cosine m times a power of two, a. bias[k] = <a, scale (c_k - m)>; for euclidean
    lift - ||scale (c_k - m)||^2 / 2, ``lift`` the most that is so taken from a sampled code. The mean of their
    <x, c - m> is 0 if all are finite: every row has a score >= 0, of which alone ``best_groups`` keeps the order.
    bounds[0 .. 2] = scale, whether this is a cone, ||a||^2; from bounds[8], for every block the maxima of
    ||scale (c - m)|| (Inf: do not screen), of what rounding took from it, of |bias| + lift, and whether a code is not
    finite; bounds[4 .. 7], from ``screen``: the maxima of all blocks.
    hard[N + group], the number of rows that the screening cannot decide, becomes 0.
    """
    group, block = in_turn(groups)
    codebook += group.to(tl.int64) * K * stride_k
    center, bounds = frame_of(center, bounds, group, num_blocks, D)
    ids = block * BLOCK_K + tl.arange(0, BLOCK_K)
    sampled = (tl.arange(0, SAMPLE).to(tl.int64) * K // SAMPLE).to(tl.int32)
    sample_rows, everywhere = codebook + sampled.to(tl.int64) * stride_k, sampled >= 0
    own = codebook + ids.to(tl.int64) * stride_k
    largest = tl.zeros((BLOCK_K,), tl.float32)
    sample_largest = tl.zeros((SAMPLE,), tl.float32)
    away = tl.zeros((SAMPLE,), tl.float32)
    longest = tl.zeros((1,), tl.float32)
    for chunk in range(NUM_D):
        values = load_rows(own, ids < K, chunk * BLOCK_D, D, stride_d, BLOCK_D)
        largest = tl.maximum(largest, tl.max(magnitude(values), axis=1))
        values = load_rows(sample_rows, everywhere, chunk * BLOCK_D, D, stride_d, BLOCK_D)
        sample_largest = tl.maximum(sample_largest, tl.max(magnitude(values), axis=1))
        middle = sample_center(values)
        away = tl.maximum(away, tl.max(tl.abs(values - middle[None, :]), axis=1))
        longest = tl.maximum(longest, tl.max(tl.abs(middle), axis=0))
    finite = sample_largest < float("inf")
    scale = power_of_two_scale(tl.max(tl.where(finite, away, 0.0), axis=0))
    other = tl.min(tl.where(finite, sampled, 2**31 - 1), axis=0)
    usable = (ids < K) & (largest < float("inf"))
    source = stand_ins(ids, usable, other, LANES, BLOCK_K)
    rows, mask = codebook + source.to(tl.int64) * stride_k, source < K

    to_axis = 1.0 if EUCLIDEAN else power_of_two_scale(tl.max(longest, axis=0))
    length = tl.zeros((1,), tl.float32)
    along = tl.zeros((BLOCK_K,), tl.float32)
    places = group * (num_blocks * BLOCK_K) + ids
    squares = tl.zeros((BLOCK_K,), tl.float32)
    losses = tl.zeros((BLOCK_K,), tl.float32)
    largest_packed = tl.zeros((BLOCK_K,), tl.float32)
    spread = tl.zeros((SAMPLE,), tl.float32)
    for chunk in range(NUM_D):
        offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        sample = load_rows(sample_rows, everywhere, chunk * BLOCK_D, D, stride_d, BLOCK_D)
        middle = sample_center(sample)
        sample = (sample - middle[None, :]) * scale
        spread += tl.sum(sample * sample, axis=1)
        if block == 0:
            tl.store(center + offs_d, middle * to_axis)
        values = (load_rows(rows, mask, chunk * BLOCK_D, D, stride_d, BLOCK_D) - middle[None, :]) * scale
        rounded = values.to(tl.float16)
        loss = values - rounded.to(tl.float32)
        squares += tl.sum(values * values, axis=1)
        along += tl.sum(values * (middle * to_axis)[None, :], axis=1)
        length += tl.sum(middle * to_axis * (middle * to_axis), axis=0)
        losses += tl.sum(loss * loss, axis=1)
        largest_packed = tl.maximum(largest_packed, tl.max(magnitude(values), axis=1))
        tl.store(packed + places.to(tl.int64)[:, None] * (BLOCK_D * NUM_D) + offs_d[None, :], rounded)
    lift = 0.5 * tl.max(tl.where(finite, spread, 0.0), axis=0) if EUCLIDEAN else 0.0
    biases = lift - 0.5 * squares if EUCLIDEAN else along
    tl.store(bias + places, biases)
    screened = (tl.max(largest_packed, axis=0) < 65504.0) & (other < K)
    of_block = bounds + 8 + block
    tl.store(of_block, tl.where(screened, tl.sqrt(tl.max(squares, axis=0)), float("inf")))
    tl.store(of_block + num_blocks, tl.sqrt(tl.max(losses, axis=0)))
    tl.store(of_block + 2 * num_blocks, tl.max(tl.abs(biases), axis=0) + lift)
    tl.store(of_block + 3 * num_blocks, tl.max(((ids < K) & (largest == float("inf"))).to(tl.float32), axis=0))
    if block == 0:
        of_axis = tl.max(length, axis=0)
        cone = of_axis * (scale / to_axis) * (scale / to_axis) > 16 * tl.max(squares, axis=0)
        tl.store(bounds, scale)
        tl.store(bounds + 1, cone.to(tl.float32))
        tl.store(bounds + 2, of_axis)
        tl.store(hard + N + group, 0)


@triton.jit
def reduce_bounds(bounds, num_blocks):
    """To bounds[4 .. 7] the maxima over all blocks of the four that ``pack_codebook`` wrote."""
    which, largest = tl.arange(0, 4), tl.zeros((4, 128), tl.float32)
    for start in range(0, num_blocks, 128):
        offs = start + tl.arange(0, 128)
        at = bounds + 8 + which[:, None] * num_blocks + offs[None, :]
        largest = tl.maximum(largest, tl.load(at, mask=(offs < num_blocks)[None, :], other=0.0))
    tl.store(bounds + 4 + which, tl.max(largest, axis=1))


@triton.jit
def best_groups(
    tile, rows, mask_n, packed, bias, center, before, shift, scale, weight, first, last, D, stride_d,
    BIASED: tl.constexpr, INDEX_BITS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """Keys of the three best groups of every row and lane [N, LANES] over blocks first .. last - 1 of codes, int32.

    The bits of scores >= 0 order as integers do, above those of all others, whose order is lost: a row that might need
    them is left to ``scan``. Hopper and AMD have an integer maximum of three; AMD's of floats quiets operands first.
    """
    BLOCK_N: tl.constexpr = mask_n.shape[0]
    best = tl.full((BLOCK_N, LANES), -(2**31), tl.int32)
    second = best
    third = best
    low_bits: tl.constexpr = (1 << INDEX_BITS) - 1
    offs_k, offs_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    codes = packed + (first * BLOCK_K + offs_k).to(tl.int64)[:, None] * (BLOCK_D * NUM_D) + offs_d[None, :]
    for block in range(0, last - first):
        scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if BIASED:
            scores += tl.load(bias + (first + block) * BLOCK_K + offs_k)[None, :] * weight[:, None]
        if NUM_D == 1:
            scores = tl.dot(tile, tl.load(codes).T, scores)
        else:
            for chunk in range(NUM_D):
                part = load_centered(rows, mask_n, center, before, shift, chunk * BLOCK_D, D, stride_d, BLOCK_D)
                part = (part * scale[:, None]).to(tl.float16)
                scores = tl.dot(part, tl.load(codes + chunk * BLOCK_D).T, scores)
        scores = scores.to(tl.int32, bitcast=True)
        key = (tl.max(tl.reshape(scores, (BLOCK_N, BLOCK_K // LANES, LANES)), axis=1) & ~low_bits) | block
        lower = tl.minimum(best, key)
        best = tl.maximum(best, key)
        third = tl.maximum(third, tl.minimum(second, lower))
        second = tl.maximum(second, lower)
        codes += BLOCK_K * BLOCK_D * NUM_D
    return best, second, third


@triton.jit
def screen(
    x,
    packed,
    bias,
    center,
    bounds,
    keys,
    rest,
    N,
    D,
    num_blocks,
    groups,
    x_stride_n,
    x_stride_d,
    EUCLIDEAN: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):
    """keys [N, SPLIT, 2, LANES]: best and second best group of every lane; rest [N, SPLIT]: the best one dropped."""
    part = tl.program_id(1)
    group, row_block = in_turn(groups)
    first = group * num_blocks + num_blocks * part // SPLIT
    last = group * num_blocks + num_blocks * (part + 1) // SPLIT
    center, bounds = frame_of(center, bounds, group, num_blocks, D)
    offs_n = rows_of(group, row_block, groups, BLOCK_N)
    mask_n = offs_n < N
    rows = x + offs_n * x_stride_n
    before, shift, scale, weight, _ = row_frame(rows, mask_n, center, bounds, D, x_stride_d, EUCLIDEAN, BLOCK_D, NUM_D)
    tile = load_centered(rows, mask_n, center, before, shift, 0, D, x_stride_d, BLOCK_D) * scale[:, None]
    tile = tile.to(tl.float16)
    if row_block + part == 0:
        reduce_bounds(bounds, num_blocks)
    biased = EUCLIDEAN
    if not EUCLIDEAN:
        biased = tl.load(bounds + 1) > 0
    if biased:
        best, second, third = best_groups(
            tile, rows, mask_n, packed, bias, center, before, shift, scale, weight, first, last, D, x_stride_d,
            True, INDEX_BITS, LANES, BLOCK_K, BLOCK_D, NUM_D,
        )  # fmt: skip
    else:  # a loop of its own, which is spared a sum per score
        best, second, third = best_groups(
            tile, rows, mask_n, packed, bias, center, before, shift, scale, weight, first, last, D, x_stride_d,
            False, INDEX_BITS, LANES, BLOCK_K, BLOCK_D, NUM_D,
        )  # fmt: skip
    slots = keys + (offs_n[:, None] * SPLIT + part) * (2 * LANES) + tl.arange(0, LANES)[None, :]
    tl.store(slots, best.to(tl.float32, bitcast=True), mask=mask_n[:, None])
    tl.store(slots + LANES, second.to(tl.float32, bitcast=True), mask=mask_n[:, None])
    tl.store(rest + offs_n * SPLIT + part, tl.max(third, axis=1).to(tl.float32, bitcast=True), mask=mask_n)
