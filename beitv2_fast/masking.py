"""Which patches the student does not see: rectangular blocks (the method) or single patches (an ablation).

A mask is drawn as one Python integer with a bit for each patch, row by row: laying a block down is a shift and an
"or", counting its new patches a popcount. That is several times faster than arrays of 196 elements, and every image of
every epoch gets a new mask.
"""

import math
import random

import torch

ATTEMPTS_PER_BLOCK = 10


def block_mask(
    grid: tuple[int, int],
    num_masked: int,
    generator: random.Random,
    *,
    min_patches: int = 16,
    min_aspect: float = 0.3,
    max_patches: int | None = None,
) -> torch.Tensor:
    """Draws a mask of exactly `num_masked` patches, made of blocks (BEiT, arXiv 2106.08254, algorithm 1; BEiT v2,
    arXiv 2208.06366, section 3.2: ~40 % of the patches).

    While fewer than `num_masked` patches are masked, a block is laid down: its area is uniform between `min_patches`
    and r, the number of patches still wanted (at most `max_patches`), its aspect ratio log-uniform in
    [min_aspect, 1 / min_aspect], its place uniform. It counts if it is smaller than the grid in both directions and
    masks between 1 and r new patches; otherwise it is drawn again, up to 10 times, and when none of these counts,
    randomly chosen single patches make up the number.

    Args:
        grid: (H, W), the patches of the image in rows and columns.
        num_masked: how many patches to mask, 0 .. H*W.
        generator: the source of randomness; the same state gives the same mask.
        min_patches: the least area asked of a block (16 of 196 in the paper; overlap may make the gain smaller).
        min_aspect: the flattest block's height / width, in (0, 1].
        max_patches: the most new patches a block may mask; None: all that are still wanted.

    Returns:
        bool tensor [H, W], True where the patch is masked.

    Raises:
        ValueError: an argument is outside the range above.
    """
    height, width = _checked_grid(grid, num_masked)
    if min_patches < 1:
        raise ValueError(f"min_patches is {min_patches}; a block needs at least 1 patch")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"min_aspect is {min_aspect}; expected a height / width above 0 and at most 1, such as 0.3")
    if max_patches is not None and max_patches < min_patches:
        raise ValueError(f"max_patches is {max_patches}, less than min_patches, {min_patches}; raise it or pass None")

    log_aspect = math.log(min_aspect)
    bits = masked = 0
    while masked < num_masked:
        wanted = num_masked - masked
        if max_patches is not None:
            wanted = min(wanted, max_patches)
        for _ in range(ATTEMPTS_PER_BLOCK):
            # Towards the end `wanted` is below min_patches: the interval is then [wanted, min_patches].
            area = generator.uniform(min_patches, wanted)
            aspect = math.exp(generator.uniform(log_aspect, -log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = generator.randint(0, height - h), generator.randint(0, width - w)
            block = _block_bits(h, w, width) << (top * width + left)
            gain = (block & ~bits).bit_count()
            if 1 <= gain <= wanted:
                bits |= block
                masked += gain
                break
        else:
            break
    return _filled_up(bits, height, width, num_masked, generator)


def random_mask(grid: tuple[int, int], num_masked: int, generator: random.Random) -> torch.Tensor:
    """Draws a mask of exactly `num_masked` patches, every set of patches equally likely (the ablation without blocks).

    Returns a bool tensor [H, W]; raises ValueError as `block_mask` does.
    """
    height, width = _checked_grid(grid, num_masked)
    return _filled_up(0, height, width, num_masked, generator)


def _checked_grid(grid: tuple[int, int], num_masked: int) -> tuple[int, int]:
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"the mask's grid is {height}x{width} patches; both sides must be at least 1")
    if not 0 <= num_masked <= height * width:
        raise ValueError(f"num_masked is {num_masked}; a grid of {height}x{width} has 0 .. {height * width} to mask")
    return height, width


def _block_bits(h: int, w: int, grid_width: int) -> int:
    """The bits of an h x w block in the top left corner of a grid `grid_width` wide."""
    row = (1 << w) - 1
    return sum(row << (r * grid_width) for r in range(h))


def _filled_up(bits: int, height: int, width: int, num_masked: int, generator: random.Random) -> torch.Tensor:
    """Masks randomly chosen patches beside those of `bits` until `num_masked` are masked. -> bool [H, W]"""
    mask = [bits >> patch & 1 == 1 for patch in range(height * width)]
    missing = num_masked - sum(mask)
    if missing:
        visible = [patch for patch, masked in enumerate(mask) if not masked]
        for patch in generator.sample(visible, missing):
            mask[patch] = True
    return torch.tensor(mask).view(height, width)
