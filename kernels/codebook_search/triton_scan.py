"""GPU search, for the rows that the screening could not decide: their float64 scores against all codes; draws.

``resolve`` lists those rows: dozens of codes lie within the screening's error of the best, as near copies do, or the
codebook could not be screened. BLOCK_R of them meet a part of the codebook in one task, so that a few rows keep many
multiprocessors busy, and all rows share what is read. The grid is the same whatever their number, which the host never
learns; without any, a program ends after one load.

Costs for H such rows: 2 H K D float64 FLOPs on the tensor cores (FMAs where these have no float64), which bound it; the
codebook read H / BLOCK_R times, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_random import uniform
from .reference import NEAREST
from .triton_resolve import better, finite_or_least, write_outputs
from .triton_screen import in_turn, load_rows, rows_of

NEAR = tl.constexpr(NEAREST)
CLOSE = tl.constexpr(2.0**-10)  # of a row's square; a shorter distance is rounded by more than D 2^-43 of itself


@triton.jit
def noisy(scores, row_squares, keys, ids, temperature, EUCLIDEAN: tl.constexpr):
    """Products or squared distances -> s / temperature + Gumbel noise as ``draw_codes_reference``: [R, C] float64."""
    s = scores / tl.maximum(tl.sqrt(row_squares), 1e-12)[:, None]
    if EUCLIDEAN:
        s = -tl.sqrt(tl.where(scores < NEAR, NEAR, scores))  # NaN stays
    return s / temperature - tl.log(-tl.log(uniform(keys[:, None], ids[None, :])))


@triton.jit
def block_scores(
    rows, mask_rows, x, codebook, ids, mask_codes, D, x_stride_d, codebook_stride_k, codebook_stride_d,
    EUCLIDEAN: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """Float64 scores of the rows, whose first chunk is x, and the codes ``ids``.

    Equal codes have equal scores: every column of a product adds in the same order.
    """
    codes = codebook + ids.to(tl.int64) * codebook_stride_k
    scores = tl.zeros((mask_rows.shape[0], ids.shape[0]), tl.float64)
    squares = tl.zeros(ids.shape, tl.float64)
    for chunk in range(NUM_D):
        if NUM_D > 1:
            x = load_rows(rows, mask_rows, chunk * BLOCK_D, D, x_stride_d, BLOCK_D).to(tl.float64)
        values = load_rows(codes, mask_codes, chunk * BLOCK_D, D, codebook_stride_d, BLOCK_D).to(tl.float64)
        scores = tl.dot(x, values.T, scores, out_dtype=tl.float64)
        if EUCLIDEAN:
            squares += tl.sum(values * values, axis=1)
    return 2 * scores - squares[None, :] if EUCLIDEAN else scores


@triton.jit
def squared_distances(scores, row_squares, rows, mask_rows, codebook, ids, mask_codes, D, x_stride_d, codebook_stride_k,
                      codebook_stride_d):  # fmt: skip
    """Of the search's scores, [R, C] float64; from the differences in blocks with distances so short beside a row's
    length that its square hides them."""
    squares = row_squares[:, None] - scores
    close = tl.max((squares < row_squares[:, None] * CLOSE).to(tl.int32), axis=1)
    if tl.max(close, axis=0) > 0:
        codes = codebook + ids.to(tl.int64) * codebook_stride_k
        squares = tl.zeros(squares.shape, tl.float64)
        for _ in range(D):
            x = tl.load(rows, mask=mask_rows, other=0.0).to(tl.float64)
            v = tl.load(codes, mask=mask_codes, other=0.0).to(tl.float64)
            apart = x[:, None] - v[None, :]
            squares += apart * apart
            rows += x_stride_d
            codes += codebook_stride_d
    return squares


@triton.jit
def best_of_part(
    rows, mask_rows, codebook, first, last, D, x_stride_d, codebook_stride_k, codebook_stride_d,
    row_squares, keys, temperature,
    DRAW: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """(float64 score, index) [R] of the best of the codes first .. last - 1; -Inf and 0 if none is finite.

    The scores are those of the search, or if DRAW those of ``noisy``, whose arguments are None otherwise.
    """
    in_block = tl.arange(0, BLOCK_C)
    best = tl.full((mask_rows.shape[0], BLOCK_C), -float("inf"), tl.float64)
    found = tl.zeros((mask_rows.shape[0], BLOCK_C), tl.int32)
    x = load_rows(rows, mask_rows, 0, D, x_stride_d, BLOCK_D).to(tl.float64)
    for start in range(first, last, BLOCK_C):
        ids = start + in_block
        scores = block_scores(
            rows, mask_rows, x, codebook, ids, ids < last, D, x_stride_d, codebook_stride_k, codebook_stride_d,
            EUCLIDEAN, BLOCK_D, NUM_D,
        )  # fmt: skip
        if DRAW and EUCLIDEAN:
            scores = squared_distances(
                scores, row_squares, rows, mask_rows, codebook, ids, ids < last, D, x_stride_d, codebook_stride_k,
                codebook_stride_d,
            )  # fmt: skip
        if DRAW:
            scores = noisy(scores, row_squares, keys, ids, temperature, EUCLIDEAN)
        wins = (finite_or_least(scores) > best) & (ids < last)[None, :]
        best = tl.where(wins, scores, best)
        found = tl.where(wins, start, found)
    index = tl.zeros(mask_rows.shape, tl.int32)
    return better(best, found + in_block[None, :], tl.full(mask_rows.shape, -float("inf"), tl.float64), index)


@triton.jit
def scan(
    x,
    codebook,
    hard,
    partial,
    indices,
    normalized,
    codes,
    distances,
    N,
    K,
    D,
    part_size,
    groups,
    x_stride_n,
    x_stride_d,
    codebook_stride_k,
    codebook_stride_d,
    EUCLIDEAN: tl.constexpr,
    WRITE_NORMALIZED: tl.constexpr,
    WRITE_CODES: tl.constexpr,
    WRITE_DISTANCES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr,
):
    """partial [2, N, PARTS] float64: score and index of the best code of every part. Whichever program completes the
    last part of a block of rows combines the parts, in their order."""
    group, start = in_turn(groups)
    codebook += group.to(tl.int64) * K * codebook_stride_k
    count = tl.load(hard + N + group)
    tasks = (count + BLOCK_R - 1) // BLOCK_R * PARTS
    parts = tl.arange(0, PARTS)
    for task in range(start, tasks, tl.num_programs(0) // groups):
        block, part = task // PARTS, task % PARTS
        places = rows_of(group, block, groups, BLOCK_R)
        mask_n = places < count * groups
        offs_n = tl.load(hard + places, mask=mask_n, other=0)
        first = (part * part_size).to(tl.int32)
        score, index = best_of_part(
            x + offs_n * x_stride_n, mask_n, codebook, first, tl.minimum(first + part_size, K), D,
            x_stride_d, codebook_stride_k, codebook_stride_d, None, None, None,
            False, EUCLIDEAN, BLOCK_C, BLOCK_D, NUM_D,
        )  # fmt: skip
        combines = PARTS == 1
        if PARTS > 1:
            at = partial + places * PARTS
            tl.store(at + part, score, mask=mask_n)
            tl.store(at + N * PARTS + part, index.to(tl.float64), mask=mask_n)
            tl.debug_barrier()  # all of the block is stored before it is counted as done
            combines = tl.atomic_add(hard + N + groups + block * groups + group, 1, sem="acq_rel") == PARTS - 1
        if combines:
            if PARTS > 1:
                of_parts, mask = at[:, None] + parts[None, :], mask_n[:, None]
                scores = tl.load(of_parts, mask=mask, other=0.0, cache_modifier=".cg")  # of other multiprocessors
                found = tl.load(of_parts + N * PARTS, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int32)
                least = tl.full(mask_n.shape, -float("inf"), tl.float64)
                score, index = better(scores, found, least, tl.zeros(mask_n.shape, tl.int32))
            write_outputs(
                x, codebook, indices, normalized, codes, distances, offs_n, mask_n, index, mask_n, D,
                x_stride_n, x_stride_d, codebook_stride_k, codebook_stride_d,
                EUCLIDEAN, WRITE_NORMALIZED, WRITE_CODES, WRITE_DISTANCES, BLOCK_D, NUM_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["temperature"])
def draw(
    x, codebook, indices, N, K, D, groups, x_stride_n, x_stride_d, codebook_stride_k, codebook_stride_d,
    keys, temperature,
    EUCLIDEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """indices [N] of ``draw_codes``: BLOCK_R rows of a program against all codes. temperature: float64 as an int64.

    Costs: 2 N K D float64 FLOPs on the tensor cores where they have float64; two float64 logarithms per row and code,
    which bound it; the codebook read N / BLOCK_R times, from L2. Of blocks with close codes the distances again,
    2 D float64 operations each without tensor cores.
    """
    group, row_block = in_turn(groups)
    codebook += group.to(tl.int64) * K * codebook_stride_k
    offs_n = rows_of(group, row_block, groups, BLOCK_R)
    mask_n = offs_n < N
    rows, squares = x + offs_n * x_stride_n, tl.zeros((BLOCK_R,), tl.float64)
    for chunk in range(NUM_D):
        values = load_rows(rows, mask_n, chunk * BLOCK_D, D, x_stride_d, BLOCK_D).to(tl.float64)
        squares += tl.sum(values * values, axis=1)
    _, index = best_of_part(
        rows, mask_n, codebook, 0, K, D, x_stride_d, codebook_stride_k, codebook_stride_d,
        squares, tl.load(keys + offs_n, mask=mask_n, other=0), temperature.to(tl.float64, bitcast=True),
        True, EUCLIDEAN, BLOCK_C, BLOCK_D, NUM_D,
    )  # fmt: skip
    tl.store(indices + offs_n, tl.where(squares < float("inf"), index, 0).to(tl.int64), mask=mask_n)
