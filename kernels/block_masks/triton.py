"""block_masks on NVIDIA and AMD GPUs: its launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..gpu import device_of, next_power_of_2
from .triton_paint import paint_masks

MAX_PATCHES = 2**12  # of a grid filled up to powers of two: more do not fit into a program's registers


def fits(height: int, width: int) -> bool:
    return next_power_of_2(height) * next_power_of_2(width) <= MAX_PATCHES


def block_masks_triton(
    keys: Tensor, height: int, width: int, num_masked: int, min_patches: int, min_aspect: float, max_patches: int
) -> Tensor:
    masks = torch.empty(len(keys), height, width, dtype=torch.uint8, device=keys.device)
    rows, columns = next_power_of_2(height), next_power_of_2(width)
    if len(keys):
        with device_of(keys):
            paint_masks[(len(keys),)](
                keys.contiguous(), masks, num_masked, min_patches, max_patches, HEIGHT=height, WIDTH=width,
                LOG_ASPECT=math.log(min_aspect), BLOCK_H=rows, BLOCK_W=columns,
                num_warps=max(rows * columns // 256, 1), enable_fp_fusion=False,
            )  # fmt: skip
    return masks.view(torch.bool)
