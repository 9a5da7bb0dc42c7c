"""Small pictures as tensors, for TensorBoard: token maps and masked images."""

from __future__ import annotations

import torch
from torch import Tensor


def token_map(codes: Tensor, cell: int) -> Tensor:
    """Codes [h, w] -> [3, h*cell, w*cell] in [0, 1]: a colour for every code, the same in every picture."""
    hue = codes.double() * 0.6180339887498949 % 1  # the golden ratio keeps neighbouring ids apart
    phase = torch.stack([hue, hue + 1 / 3, hue + 2 / 3]) * 2 * torch.pi
    colours = 0.55 + 0.35 * torch.cos(phase)
    return colours.float().repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def masked_picture(image: Tensor, mask: Tensor) -> Tensor:
    """Image [3, H, W] with its masked patches [h, w] in grey."""
    hidden = mask.repeat_interleave(image.shape[1] // mask.shape[0], 0)
    hidden = hidden.repeat_interleave(image.shape[2] // mask.shape[1], 1)
    return torch.where(hidden, 0.5, image)
