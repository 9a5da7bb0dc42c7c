"""The k nearest codes on GPUs: float64 scores of all codes, a block at a time, and the k best so far in registers.

A row looks at a block's best score, and only where it beats the last of the k kept is it put in its place: about
``k log(K / k)`` times in all, for the rows of a program together a few times as many. Costs: 2 N K D float64 FLOPs on
the tensor cores; the codebook read N / BLOCK_R times, from L2; nothing of N x K in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_scan import block_scores
from .triton_screen import in_turn, load_rows, rows_of

LEAST = tl.constexpr(-1e300)  # below every score of fp32 values


@triton.jit
def nearest(
    x, codebook, indices, N, K, D, groups, x_stride_n, x_stride_d, codebook_stride_k, codebook_stride_d,
    EUCLIDEAN: tl.constexpr, TOP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
):  # fmt: skip
    """indices [N, TOP]: the codes of the best scores, the best first, of equal scores the lower index first."""
    group, row_block = in_turn(groups)
    codebook += group.to(tl.int64) * K * codebook_stride_k
    offs_n = rows_of(group, row_block, groups, BLOCK_R)
    mask_n = offs_n < N
    rows = x + tl.where(mask_n, offs_n, 0) * x_stride_n
    slots, in_block = tl.arange(0, SLOTS)[None, :], tl.arange(0, BLOCK_C)
    found = tl.zeros((BLOCK_R, SLOTS), tl.int32) + (K + slots)
    kept = tl.where(found < K + TOP, -float("inf"), float("inf")).to(tl.float64)
    tile = load_rows(rows, mask_n, 0, D, x_stride_d, BLOCK_D).to(tl.float64)
    for start in range(0, K, BLOCK_C):
        ids = start + in_block
        scores = block_scores(
            rows, mask_n, tile, codebook, ids, ids < K, D, x_stride_d, codebook_stride_k, codebook_stride_d,
            EUCLIDEAN, BLOCK_D, NUM_D,
        )  # fmt: skip
        scores = tl.where(tl.abs(scores) < float("inf"), scores, LEAST)  # of what is not finite
        scores = tl.where((ids < K)[None, :], scores, -float("inf"))
        top, last = tl.max(scores, axis=1), tl.min(kept, axis=1)
        while tl.max((top > last).to(tl.int32), axis=0) > 0:
            code = tl.min(tl.where(scores == top[:, None], ids[None, :], 2**31 - 1), axis=1)
            leaving = tl.max(tl.where(kept == last[:, None], found, -1), axis=1)
            place = (found == leaving[:, None]) & (top > last)[:, None]
            kept = tl.where(place, top[:, None], kept)
            found = tl.where(place, code[:, None], found)
            scores = tl.where(ids[None, :] == code[:, None], -float("inf"), scores)
            top, last = tl.max(scores, axis=1), tl.min(kept, axis=1)
    kept = tl.where(kept < float("inf"), kept, -float("inf"))
    for rank in range(TOP):
        top = tl.max(kept, axis=1)
        code = tl.min(tl.where(kept == top[:, None], found, 2**31 - 1), axis=1)
        tl.store(indices + offs_n * TOP + rank, code.to(tl.int64), mask=mask_n)
        kept = tl.where(found == code[:, None], -float("inf"), kept)
