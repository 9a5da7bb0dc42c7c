"""GPU search, second half: the exact winner among the groups that ``screen`` kept, and whatever else is asked for.

A row's screened scores are off by at most ``error`` (see ``screening_error``). Groups within twice that of the best
are scored again in float64 from the given values: 1.0 to 1.1 per row unless codes nearly coincide. Where more
groups of one lane are that close than were kept, or the codebook cannot be screened, the row is left to
``triton_scan``.

Costs: about 2 N D (group size) float64 FLOPs and (group size) D reads of the codebook (L2) per row; reads x and the
keys once, writes the outputs. Bound by issued instructions and latency: on sm_90 at D = 32 a row has 125 of a warp, and
165 for every group that is scored for any of the program's rows, which is why a program has few.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_screen import frame_of, in_turn, load_centered, load_rows, row_frame, rows_of


@triton.jit
def screening_error(
    rows, mask_rows, center, before, shift, scale, weight, bounds, code_norm, code_loss, largest_bias, D, stride_d,
    EUCLIDEAN: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """Bound of |screened - exact score| of every row, in scaled units.

    Cauchy-Schwarz on what rounding to fp16 took from the row and from the codes, measured, not assumed; then (D + 16)
    sums of a tensor core that keeps 22 bits, and one for subtracting the center in fp32. In a cone (D + 12) / 4 more
    for <a, c - m>, summed in fp32, and for subtracting a row's part along a.
    """
    squares = tl.zeros(mask_rows.shape, tl.float32)
    losses = tl.zeros(mask_rows.shape, tl.float32)
    for chunk in range(NUM_D):
        x = load_centered(rows, mask_rows, center, before, shift, chunk * BLOCK_D, D, stride_d, BLOCK_D)
        x = x * scale[:, None]
        rounded = x.to(tl.float16).to(tl.float32)
        squares += tl.sum(rounded * rounded, axis=1)
        losses += tl.sum((x - rounded) * (x - rounded), axis=1)
    norm, loss = tl.sqrt(squares), tl.sqrt(losses)
    scores = (norm + loss) * (code_norm + code_loss) + tl.abs(weight) * largest_bias
    error = loss * code_norm + norm * code_loss + scores * ((BLOCK_D * NUM_D + 17) * 2.0**-22)
    if not EUCLIDEAN:
        along = tl.abs(weight) * tl.sqrt(tl.load(bounds + 2)) * code_norm
        error += tl.where(weight == 0, 0.0, along * ((BLOCK_D * NUM_D + 12) * 2.0**-24))
    return 1.01 * error + 1e-30


@triton.jit
def finite_or_least(scores):
    """-Inf for a code with NaN or Inf: such a code has no finite score, and every other code has one in float64."""
    return tl.where(tl.abs(scores) < float("inf"), scores, -float("inf"))


@triton.jit
def exact_scores(
    rows, codes, mask, D, x_stride_d, codebook_stride_d,
    EUCLIDEAN: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """Float64 scores [R, G] of the rows (pointers [R]) with their own codes (pointers [R, G]); -Inf where masked."""
    R: tl.constexpr = codes.shape[0]
    G: tl.constexpr = codes.shape[1]
    scores = tl.zeros((R, G, BLOCK_D), tl.float64)
    for chunk in range(NUM_D):
        offs_d = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        x = tl.load(rows[:, None] + offs_d[None, :] * x_stride_d, mask=mask_d[None, :], other=0.0).to(tl.float64)
        at = codes[:, :, None] + offs_d[None, None, :] * codebook_stride_d
        values = tl.load(at, mask=mask[:, :, None] & mask_d[None, None, :], other=0.0).to(tl.float64)
        scores += 2 * x[:, None, :] * values - values * values if EUCLIDEAN else x[:, None, :] * values
    scores = tl.sum(scores, axis=2)
    return tl.where(mask, finite_or_least(scores), -float("inf"))


@triton.jit
def better(scores, ids, best_score, best_index):
    """Fold candidates [R, G] into the best of every row; of equal scores the lowest index wins."""
    top = tl.max(scores, axis=1)
    lowest = tl.min(tl.where(scores == top[:, None], ids, 2**31 - 1), axis=1)
    wins = (top > best_score) | ((top == best_score) & (lowest < best_index) & (top > -float("inf")))
    return tl.where(wins, top, best_score), tl.where(wins, lowest, best_index)


@triton.jit
def write_outputs(
    x, codebook, indices, normalized, codes, distances, offs_n, mask_n, best_index, finite, D,
    x_stride_n, x_stride_d, codebook_stride_k, codebook_stride_d,
    EUCLIDEAN: tl.constexpr, WRITE_NORMALIZED: tl.constexpr, WRITE_CODES: tl.constexpr, WRITE_DISTANCES: tl.constexpr,
    BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """What is asked for of the rows ``offs_n`` whose winners are known."""
    rows = x + tl.where(mask_n, offs_n, 0) * x_stride_n
    tl.store(indices + offs_n, best_index.to(tl.int64), mask=mask_n)
    if WRITE_NORMALIZED or WRITE_CODES or WRITE_DISTANCES:
        norm = tl.zeros(mask_n.shape, tl.float32)
        if not EUCLIDEAN:
            for chunk in range(NUM_D):
                values = load_rows(rows, mask_n, chunk * BLOCK_D, D, x_stride_d, BLOCK_D)
                norm += tl.sum(values * values, axis=1)
            norm = tl.maximum(tl.sqrt(norm), 1e-12)
        distance = tl.zeros(mask_n.shape, tl.float32)
        winners = codebook + best_index.to(tl.int64) * codebook_stride_k
        for chunk in range(NUM_D):
            offs_d = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask = mask_n[:, None] & (offs_d < D)[None, :]
            values = load_rows(rows, mask_n, chunk * BLOCK_D, D, x_stride_d, BLOCK_D)
            if not EUCLIDEAN:
                values = values / norm[:, None]
            code = tl.load(winners[:, None] + offs_d[None, :] * codebook_stride_d, mask=mask, other=0.0)
            difference = tl.where(mask, values - code.to(tl.float32), 0.0)
            distance += tl.sum(difference * difference, axis=1)
            at = offs_n[:, None] * D + offs_d[None, :]
            if WRITE_NORMALIZED:
                tl.store(normalized + at, values, mask=mask)
            if WRITE_CODES:
                tl.store(codes + at, code, mask=mask)
        if WRITE_DISTANCES:
            tl.store(distances + offs_n, tl.where(finite, distance, float("nan")), mask=mask_n)


@triton.jit
def resolve(
    x,
    codebook,
    center,
    bounds,
    keys,
    rest,
    hard,
    indices,
    normalized,
    codes,
    distances,
    N,
    K,
    D,
    num_blocks,
    groups,
    x_stride_n,
    x_stride_d,
    codebook_stride_k,
    codebook_stride_d,
    EUCLIDEAN: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    WRITE_NORMALIZED: tl.constexpr,
    WRITE_CODES: tl.constexpr,
    WRITE_DISTANCES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):
    """Everything that is asked for, except of the rows that remain for ``scan``, which ``hard``
    [N + groups + programs] lists: first those rows, those of the codebooks in turn; from N on how many, for each
    codebook; behind it ``scan`` counts, from 0.
    """
    group, row_block = in_turn(groups)
    codebook += group.to(tl.int64) * K * codebook_stride_k
    center, bounds = frame_of(center, bounds, group, num_blocks, D)
    offs_n = rows_of(group, row_block, groups, BLOCK_R)
    mask_n = offs_n < N
    rows = x + tl.where(mask_n, offs_n, 0) * x_stride_n
    before, shift, scale, weight, largest = row_frame(
        rows, mask_n, center, bounds, D, x_stride_d, EUCLIDEAN, BLOCK_D, NUM_D
    )
    finite = largest < float("inf")
    code_norm, code_loss = tl.load(bounds + 4), tl.load(bounds + 5)
    largest_bias, odd_codes = tl.load(bounds + 6), tl.load(bounds + 7)
    screened = code_norm < float("inf")
    error = screening_error(
        rows, mask_n, center, before, shift, scale, weight, bounds, code_norm, code_loss, largest_bias, D, x_stride_d,
        EUCLIDEAN, BLOCK_D, NUM_D,
    )  # fmt: skip
    SLOTS: tl.constexpr = SPLIT * 2 * LANES
    slot_ids = tl.arange(0, SLOTS)
    left = tl.load(keys + offs_n[:, None] * SLOTS + slot_ids[None, :], mask=mask_n[:, None], other=-float("inf"))
    dropped = tl.load(
        rest + offs_n[:, None] * SPLIT + tl.arange(0, SPLIT)[None, :], mask=mask_n[:, None], other=-float("inf")
    )
    top = tl.max(left, axis=1)
    threshold = top - 2.001 * (error + (tl.abs(top) + 2 * error) * 2.0 ** (INDEX_BITS - 22))

    searched = mask_n & finite  # a row with NaN or Inf has index 0
    dropped = tl.max(dropped, axis=1)
    if not EUCLIDEAN:  # and so has a zero row, whose scores all tie
        searched = searched & ((largest > 0) | (odd_codes > 0))
    undecided = searched & ((dropped >= threshold) | (threshold <= 0) | (screened == 0))
    searched = searched & (undecided == 0)
    best_score = tl.full((BLOCK_R,), -float("inf"), tl.float64)
    best_index = tl.zeros((BLOCK_R,), tl.int32)

    GROUP: tl.constexpr = BLOCK_K // LANES
    CHUNK: tl.constexpr = BLOCK_D // 4
    low_bits: tl.constexpr = (1 << INDEX_BITS) - 1
    while tl.max((searched & (top >= threshold)).to(tl.int32), axis=0) > 0:
        slot = tl.min(tl.where(left == top[:, None], slot_ids[None, :], SLOTS), axis=1)
        part = slot // (2 * LANES)
        block = num_blocks * part // SPLIT + (top.to(tl.int32, bitcast=True) & low_bits)
        ids = (block * BLOCK_K + slot % LANES)[:, None] + (tl.arange(0, GROUP) * LANES)[None, :]
        mask = (searched & (top >= threshold))[:, None] & (ids < K)
        pointers = codebook + tl.where(mask, ids, 0).to(tl.int64) * codebook_stride_k
        scores = exact_scores(rows, pointers, mask, D, x_stride_d, codebook_stride_d, EUCLIDEAN, CHUNK, 4 * NUM_D)
        best_score, best_index = better(scores, ids, best_score, best_index)
        left = tl.where(slot_ids[None, :] == slot[:, None], -float("inf"), left)
        top = tl.max(left, axis=1)

    number = tl.sum(undecided.to(tl.int64), axis=0)
    if number > 0:
        place = tl.atomic_add(hard + N + group, number, sem="relaxed") + tl.cumsum(undecided.to(tl.int64), axis=0) - 1
        tl.store(hard + place * groups + group, offs_n, mask=undecided)
    tl.store(hard + N + groups + tl.program_id(0), 0)
    write_outputs(
        x, codebook, indices, normalized, codes, distances, offs_n, mask_n & (undecided == 0), best_index, finite, D,
        x_stride_n, x_stride_d, codebook_stride_k, codebook_stride_d,
        EUCLIDEAN, WRITE_NORMALIZED, WRITE_CODES, WRITE_DISTANCES, BLOCK_D, NUM_D,
    )  # fmt: skip
