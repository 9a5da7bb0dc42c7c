"""The definition of block_masks: one mask after another, in Python.

A mask is an integer with a bit for each patch, row by row: laying a block down is a shift and an "or", counting its new
patches a popcount.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..counter_random import as_uniform, random_bits

ATTEMPTS_PER_BLOCK = 10
MAX_ATTEMPTS = 64
DRAWS_PER_ATTEMPT = 4  # area, aspect ratio, top, left
FIRST_FILL = DRAWS_PER_ATTEMPT * MAX_ATTEMPTS  # the draw of patch 0 where single patches make up the number


def block_masks_reference(
    keys: Tensor, height: int, width: int, num_masked: int, min_patches: int, min_aspect: float, max_patches: int
) -> Tensor:
    settings = (height, width, num_masked, min_patches, min_aspect, max_patches)
    bits = random_bits(keys[:, None], torch.arange(FIRST_FILL + height * width))  # [B, draws]
    masks = [_block_mask(draws, *settings) for draws in bits]
    return torch.tensor(masks, dtype=torch.bool).view(len(masks), height, width)


def _block_mask(
    draws: Tensor, height: int, width: int, num_masked: int, min_patches: int, min_aspect: float, max_patches: int
) -> list[bool]:
    log_aspect, uniform = math.log(min_aspect), as_uniform(draws[:FIRST_FILL]).view(-1, DRAWS_PER_ATTEMPT).tolist()
    bits = masked = failures = attempt = 0
    while masked < num_masked and failures < ATTEMPTS_PER_BLOCK and attempt < MAX_ATTEMPTS:
        of_area, of_aspect, of_top, of_left = uniform[attempt]
        attempt += 1
        failures += 1
        wanted = min(num_masked - masked, max_patches)
        # Towards the end `wanted` is below min_patches: the interval is then [wanted, min_patches].
        area = min_patches + (wanted - min_patches) * of_area
        aspect = math.exp(log_aspect * (1 - 2 * of_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = int((height - h + 1) * of_top), int((width - w + 1) * of_left)
        block = _block_bits(h, w, width) << (top * width + left)
        gain = (block & ~bits).bit_count()
        if 1 <= gain <= wanted:
            bits |= block
            masked += gain
            failures = 0
    mask = [bits >> patch & 1 == 1 for patch in range(height * width)]
    visible = [patch for patch in range(height * width) if not mask[patch]]
    unsigned = [value % 2**64 for value in draws[FIRST_FILL:].tolist()]
    for patch in sorted(visible, key=lambda patch: unsigned[patch])[: num_masked - masked]:
        mask[patch] = True
    return mask


def _block_bits(h: int, w: int, grid_width: int) -> int:
    """The bits of an h x w block in the top left corner of a grid ``grid_width`` wide."""
    row = (1 << w) - 1
    return sum(row << (r * grid_width) for r in range(h))
