"""block_masks: which patches of each image are hidden, as a function of one key per image, on any device.

    u(k) = the k-th uniform number of the image's key (splitmix64 in counter mode)
    while fewer than num_masked patches are masked: lay down a block of random area, aspect ratio and place

The kernel bound is latency: a mask is about 11 attempts of a dozen operations each, 196 bytes out, nothing in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import block_masks_op
from .reference import MAX_ATTEMPTS

__all__ = ["MAX_ATTEMPTS", "block_masks"]


def block_masks(
    keys: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_patches: int = 16,
    min_aspect: float = 0.3,
    max_patches: int | None = None,
) -> Tensor:
    """Draws a mask of exactly ``num_masked`` patches for each key, made of blocks (BEiT, arXiv 2106.08254, algorithm 1;
    BEiT v2, arXiv 2208.06366, section 3.2: ~40 % of the patches).

    While fewer than ``num_masked`` patches are masked, a block is laid down: its area is uniform between
    ``min_patches`` and r, the number of patches still wanted (at most ``max_patches``), its aspect ratio log-uniform in
    [min_aspect, 1 / min_aspect], its place uniform. It counts if it is smaller than the grid in both directions and
    masks between 1 and r new patches; otherwise it is drawn again, up to 10 times. When none of these counts, or after
    ``MAX_ATTEMPTS`` attempts in all (fewer than 1 in 10,000 masks needs as many), randomly chosen single patches make
    up the number.

    CPU, CUDA and ROCm draw the same masks: only an area or ratio within 1e-14 of a rounding boundary can differ.
    On a GPU nothing waits for the device.

    Args:
        keys: [B] int64, random bits: one mask each. The same key gives the same mask.
        grid: (H, W), the patches of the image in rows and columns.
        num_masked: how many patches to mask, 0 .. H*W.
        min_patches: the least area asked of a block (16 of 196 in the paper; overlap may make the gain smaller).
        min_aspect: the flattest block's height / width, in (0, 1].
        max_patches: the most new patches a block may mask; None: all that are still wanted.

    Returns:
        bool [B, H, W] on the keys' device, True where the patch is masked.

    Raises:
        ValueError: an argument is outside the range above.
    """
    check_settings(grid, num_masked, min_patches, min_aspect, max_patches)
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"block_masks: keys must be int64 [B]; got {keys.dtype} of shape {list(keys.shape)}")
    most = num_masked if max_patches is None else max_patches
    masks: Tensor = block_masks_op(keys, *grid, num_masked, min_patches, min_aspect, most)
    return masks


def check_settings(
    grid: tuple[int, int], num_masked: int, min_patches: int, min_aspect: float, max_patches: int | None
) -> None:
    """ValueError that names the setting outside its range."""
    check_count(grid, num_masked)
    if min_patches < 1:
        raise ValueError(f"min_patches is {min_patches}; a block needs at least 1 patch")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"min_aspect is {min_aspect}; expected a height / width above 0 and at most 1, such as 0.3")
    if max_patches is not None and max_patches < min_patches:
        raise ValueError(f"max_patches is {max_patches}, less than min_patches, {min_patches}; raise it or pass None")


def check_count(grid: tuple[int, int], num_masked: int) -> None:
    """ValueError unless the grid has so many patches to mask."""
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"the mask's grid is {height}x{width} patches; both sides must be at least 1")
    if not 0 <= num_masked <= height * width:
        raise ValueError(f"num_masked is {num_masked}; a grid of {height}x{width} has 0 .. {height * width} to mask")
