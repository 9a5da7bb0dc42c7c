"""Kernel: one program draws the mask of one image, in registers, as the definition does.

Latency bounds it: about 11 attempts in a row, each of a few fp64 operations and a sum over the grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_random import random_bits, uniform
from .reference import ATTEMPTS_PER_BLOCK, DRAWS_PER_ATTEMPT, FIRST_FILL, MAX_ATTEMPTS

FAILURES, ATTEMPTS = tl.constexpr(ATTEMPTS_PER_BLOCK), tl.constexpr(MAX_ATTEMPTS)
DRAWS, FIRST = tl.constexpr(DRAWS_PER_ATTEMPT), tl.constexpr(FIRST_FILL)
LEAST, MOST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)
ROUNDS = tl.constexpr(1.5 * 2**52)  # added and subtracted, it rounds a small fp64 number to an integer, halves to even


@triton.jit
def paint_masks(
    keys,
    masks,
    num_masked,
    min_patches,
    max_patches,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG_ASPECT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + image)
    rows, columns = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_W)[None, :]
    mask = tl.zeros((BLOCK_H, BLOCK_W), tl.int1)
    log_aspect = tl.full((), LOG_ASPECT, tl.float64)
    masked, failures, attempt = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while (masked < num_masked) & (failures < FAILURES) & (attempt < ATTEMPTS):
        draw = attempt * DRAWS
        wanted = tl.minimum(num_masked - masked, max_patches)
        area = min_patches + (wanted - min_patches) * uniform(key, draw)
        aspect = tl.exp(log_aspect * (1.0 - 2.0 * uniform(key, draw + 1)))
        height, width = _rounded(tl.sqrt(area * aspect)), _rounded(tl.sqrt(area / aspect))
        top = ((HEIGHT - height + 1) * uniform(key, draw + 2)).to(tl.int32)
        left = ((WIDTH - width + 1) * uniform(key, draw + 3)).to(tl.int32)
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        new = inside & (mask == 0)
        gain = _sum(new)
        counts = (height < HEIGHT) & (width < WIDTH) & (gain >= 1) & (gain <= wanted)
        mask = mask | (new & counts)
        masked += tl.where(counts, gain, 0)
        failures = tl.where(counts, 0, failures + 1)
        attempt += 1
    # Of what is missing, the visible patches with the lowest bits, read as unsigned. A key's bits are all different.
    patches, in_grid = rows * WIDTH + columns, (rows < HEIGHT) & (columns < WIDTH)
    bits = tl.where(in_grid & (mask == 0), random_bits(key, patches + FIRST) ^ LEAST, MOST)
    while masked < num_masked:
        lowest = bits == tl.min(tl.min(bits, 1), 0)
        mask = mask | lowest
        bits = tl.where(lowest, MOST, bits)
        masked += 1
    tl.store(masks + image * (HEIGHT * WIDTH) + patches, mask.to(tl.uint8), mask=in_grid)


@triton.jit
def _rounded(x):
    return ((x + ROUNDS) - ROUNDS).to(tl.int32)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x.to(tl.int32), 1), 0)
