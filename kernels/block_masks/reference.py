"""The definition of block_masks: one mask after another, in Python.

A mask is an integer with a bit for each patch, row by row: laying a block down is a shift and an "or", counting its new
patches a popcount.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..counter_random import GAMMA, MIX1, MIX2

ATTEMPTS_PER_BLOCK = 10
MAX_ATTEMPTS = 64
DRAWS_PER_ATTEMPT = 4  # area, aspect ratio, top, left
FIRST_FILL = DRAWS_PER_ATTEMPT * MAX_ATTEMPTS  # the draw of patch 0 where single patches make up the number


def random_bits(key: int, k: int) -> int:
    """64 bits: the k-th draw of a key (splitmix64, Steele et al. 2014, entered at key + k * GAMMA)."""
    z = (key + k * GAMMA) % 2**64
    z = (z ^ z >> 30) * MIX1 % 2**64
    z = (z ^ z >> 27) * MIX2 % 2**64
    return z ^ z >> 31


def uniform(key: int, k: int) -> float:
    """The k-th draw of a key as a number in [0, 1) with 53 bits."""
    return (random_bits(key, k) >> 11) * 2.0**-53


def block_masks_reference(
    keys: Tensor, height: int, width: int, num_masked: int, min_patches: int, min_aspect: float, max_patches: int
) -> Tensor:
    settings = (height, width, num_masked, min_patches, min_aspect, max_patches)
    masks = [_block_mask(key, *settings) for key in keys.tolist()]
    return torch.tensor(masks, dtype=torch.bool).view(len(masks), height, width)


def _block_mask(
    key: int, height: int, width: int, num_masked: int, min_patches: int, min_aspect: float, max_patches: int
) -> list[bool]:
    log_aspect = math.log(min_aspect)
    bits = masked = failures = attempt = 0
    while masked < num_masked and failures < ATTEMPTS_PER_BLOCK and attempt < MAX_ATTEMPTS:
        draws = [uniform(key, DRAWS_PER_ATTEMPT * attempt + i) for i in range(DRAWS_PER_ATTEMPT)]
        attempt += 1
        failures += 1
        wanted = min(num_masked - masked, max_patches)
        # Towards the end `wanted` is below min_patches: the interval is then [wanted, min_patches].
        area = min_patches + (wanted - min_patches) * draws[0]
        aspect = math.exp(log_aspect * (1 - 2 * draws[1]))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = int((height - h + 1) * draws[2]), int((width - w + 1) * draws[3])
        block = _block_bits(h, w, width) << (top * width + left)
        gain = (block & ~bits).bit_count()
        if 1 <= gain <= wanted:
            bits |= block
            masked += gain
            failures = 0
    mask = [bits >> patch & 1 == 1 for patch in range(height * width)]
    visible = [patch for patch in range(height * width) if not mask[patch]]
    for patch in sorted(visible, key=lambda patch: random_bits(key, FIRST_FILL + patch))[: num_masked - masked]:
        mask[patch] = True
    return mask


def _block_bits(h: int, w: int, grid_width: int) -> int:
    """The bits of an h x w block in the top left corner of a grid `grid_width` wide."""
    row = (1 << w) - 1
    return sum(row << (r * grid_width) for r in range(h))
