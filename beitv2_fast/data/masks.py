"""Which patches the student does not see: rectangular blocks (the method) or single patches (an ablation).

The blocks are drawn by the op `beitv2_fast.kernels.block_masks`, in C++ on the CPU, in torch ops on a GPU.
"""

import torch
from torch import Tensor

from ..kernels.block_masks import block_masks, check_count
from ..kernels.counter_random import random_bits

__all__ = ["block_masks", "patch_masks", "random_masks"]


def patch_masks(keys: Tensor, kind: str, grid: tuple[int, int], num_masked: int, min_patches: int) -> Tensor:
    """The student's masks, bool [B, H*W] on the device of the keys [B] int64: of kind "block" or "random"."""
    if kind == "random":
        return random_masks(keys, grid, num_masked).flatten(1)
    return block_masks(keys, grid, num_masked, min_patches=min_patches).flatten(1)


def random_masks(keys: Tensor, grid: tuple[int, int], num_masked: int) -> Tensor:
    """Draws a mask of exactly `num_masked` patches for each key, every set of patches equally likely (the ablation
    without blocks).

    Args and result are those of `block_masks`: keys [B] int64 -> bool [B, H, W] on the same device, of (keys, settings)
    alone. Raises ValueError for an impossible grid or number.
    """
    height, width = grid
    check_count(grid, num_masked)
    bits = random_bits(keys[:, None], torch.arange(height * width, device=keys.device))
    mask = torch.zeros(bits.shape, dtype=torch.bool, device=keys.device)
    mask.scatter_(1, bits.argsort(dim=1)[:, :num_masked], True)
    return mask.view(-1, height, width)
