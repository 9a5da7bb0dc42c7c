"""block_masks as a custom op: the C++ op or the definition on the CPU, a kernel on GPUs, torch ops elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..counter_random import as_uniform, random_bits
from ..native import native_ops
from ..registration import custom_op
from .reference import ATTEMPTS_PER_BLOCK, DRAWS_PER_ATTEMPT, FIRST_FILL, MAX_ATTEMPTS, block_masks_reference


def block_masks_batched(
    keys: Tensor, height: int, width: int, num_masked: int, min_patches: int, min_aspect: float, max_patches: int
) -> Tensor:
    """For other devices: all masks of the batch attempt their next block at once, and nobody waits.

    The number of rounds is fixed, so that nothing has to be read back: MAX_ATTEMPTS, after which every mask is through.
    """
    device, log_aspect = keys.device, math.log(min_aspect)
    k = torch.arange(FIRST_FILL + height * width, device=device)
    bits = random_bits(keys[:, None], k)  # [B, draws]
    draws = as_uniform(bits[:, :FIRST_FILL]).view(len(keys), MAX_ATTEMPTS, DRAWS_PER_ATTEMPT)
    aspects = (log_aspect * (1 - 2 * draws[..., 1])).exp()
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    mask = torch.zeros(len(keys), height, width, dtype=torch.bool, device=device)
    masked = torch.zeros(len(keys), dtype=torch.int64, device=device)
    failures = torch.zeros_like(masked)
    for attempt in range(MAX_ATTEMPTS):
        wanted = (num_masked - masked).clamp(max=max_patches)
        area, aspect = min_patches + (wanted - min_patches) * draws[:, attempt, 0], aspects[:, attempt]
        h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = ((height - h + 1) * draws[:, attempt, 2]).long()
        left = ((width - w + 1) * draws[:, attempt, 3]).long()
        inside_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])  # [B, H]
        inside_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
        new = inside_rows[:, :, None] & inside_columns[:, None, :] & ~mask
        gain = new.sum((1, 2))
        going_on = (masked < num_masked) & (failures < ATTEMPTS_PER_BLOCK)
        counts = going_on & (h < height) & (w < width) & (gain >= 1) & (gain <= wanted)
        mask |= new & counts[:, None, None]
        masked += gain * counts
        failures = torch.where(counts, 0, failures + 1)
    return _filled_up(mask, bits[:, FIRST_FILL:], num_masked - masked)


def _filled_up(mask: Tensor, bits: Tensor, missing: Tensor) -> Tensor:
    """Masks the ``missing`` [B] visible patches of mask [B, H, W] whose bits [B, H*W], read as unsigned, are lowest."""
    flat = mask.flatten(1)
    keys = (bits ^ torch.iinfo(torch.int64).min).masked_fill(flat, torch.iinfo(torch.int64).max)
    place = torch.empty_like(keys)
    place.scatter_(1, keys.argsort(dim=1), torch.arange(keys.shape[1], device=keys.device).expand_as(keys))
    return (flat | (place < missing[:, None])).view_as(mask)


block_masks_op = custom_op("beitv2_fast::block_masks")(block_masks_batched)


@block_masks_op.register_kernel("cpu")
def _block_masks_cpu(keys: Tensor, *settings: Any) -> Tensor:
    masks: Tensor = (torch.ops.beitv2_fast_cpu.block_masks if native_ops() else block_masks_reference)(keys, *settings)
    return masks


@block_masks_op.register_kernel("cuda")
def _block_masks_cuda(keys: Tensor, height: int, width: int, *settings: Any) -> Tensor:
    from .triton import block_masks_triton, fits

    return (block_masks_triton if fits(height, width) else block_masks_batched)(keys, height, width, *settings)


@block_masks_op.register_fake
def _block_masks_fake(keys: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return keys.new_empty(keys.shape[0], height, width, dtype=torch.bool)
