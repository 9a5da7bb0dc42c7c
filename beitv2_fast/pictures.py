"""Small pictures as tensors, for TensorBoard and the report: token maps, heat maps and masked images."""

from __future__ import annotations

import torch
from torch import Tensor

HEAT = ((0, 0, 4), (64, 15, 108), (148, 38, 103), (221, 81, 58), (251, 166, 10), (252, 255, 164))
HIDDEN = (0.36, 0.45, 0.60)  # of masked patches: no color that a gray photograph has


def token_map(codes: Tensor, cell: int, colors: Tensor | None = None) -> Tensor:
    """Codes [h, w] -> [3, h*cell, w*cell] in [0, 1]: a color for every code, the same in every picture.

    Args:
        colors: [K, 3], such as ``code_colors``; by default unrelated hues, which need no codebook.
    """
    if colors is not None:
        cells = colors[codes].movedim(-1, 0)
    else:
        hue = codes.double() * 0.6180339887498949 % 1  # the golden ratio keeps neighboring ids apart
        cells = from_hue(hue, torch.tensor(0.55), torch.tensor(0.35))
    return cells.float().repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def code_colors(codebook: Tensor, counts: Tensor) -> Tensor:
    """A color for each code such that codes near each other in the codebook look alike: [K, D] -> [K, 3] in [0, 1].

    The direction in the plane of the first two principal components gives the hue, the third component the lightness,
    both spread evenly over the codes. A code weighs as the root of how often it occurs (counts [K]).
    """
    weight = (counts.double() + 1e-6).sqrt()
    weight = weight / weight.sum()
    centered = codebook.double() - weight @ codebook.double()
    axes = torch.linalg.svd(weight.sqrt()[:, None] * centered, full_matrices=False).Vh[:3]
    x = torch.nn.functional.pad(centered @ axes.T, (0, 3 - len(axes)))  # [K, 3]
    hue = _evenly(torch.atan2(x[:, 1], x[:, 0]), weight)
    return from_hue(hue, 0.45 + 0.22 * _evenly(x[:, 2], weight), torch.tensor(0.33)).T.clamp(0, 1).float()


def _evenly(values: Tensor, weight: Tensor) -> Tensor:
    """Order kept, spread over [0, 1] by weight."""
    order = values.argsort(stable=True)
    spread = torch.empty_like(values)
    spread[order] = weight[order].cumsum(0) - weight[order] / 2
    return spread


def heat_map(values: Tensor, cell: int) -> Tensor:
    """Values [h, w] in [0, 1] -> [3, h*cell, w*cell] in [0, 1]: black, purple, red, orange, pale yellow."""
    stops = torch.tensor(HEAT, dtype=torch.float32) / 255
    at = values.float().clamp(0, 1) * (len(HEAT) - 1)
    low = at.floor().long().clamp(max=len(HEAT) - 2)
    colors = torch.lerp(stops[low], stops[low + 1], (at - low)[..., None])  # [h, w, 3]
    return colors.movedim(-1, 0).repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def masked_picture(image: Tensor, mask: Tensor, fill: Tensor | None = None) -> Tensor:
    """Image [3, H, W] with its masked patches [h, w] in slate blue, or in the pixels of ``fill`` [3, H, W]."""
    hidden = mask.repeat_interleave(image.shape[1] // mask.shape[0], 0)
    hidden = hidden.repeat_interleave(image.shape[2] // mask.shape[1], 1)
    return torch.where(hidden, image.new_tensor(HIDDEN).view(3, 1, 1) if fill is None else fill, image)


def from_hue(hue: Tensor, lightness: Tensor, chroma: Tensor) -> Tensor:
    """Hue in turns [...] -> [3, ...]."""
    phase = torch.stack([hue, hue + 1 / 3, hue + 2 / 3]) * 2 * torch.pi
    return lightness + chroma * torch.cos(phase)


def class_colors(count: int) -> Tensor:
    """uint8 [count, 3]: neighboring numbers look unlike one another."""
    numbers = torch.arange(count)
    hue = numbers.double() * 0.6180339887498949 % 1  # the golden ratio
    lightness = torch.tensor([0.55, 0.72, 0.38], dtype=torch.float64)[numbers % 3]
    return (from_hue(hue, lightness, torch.tensor(0.33)).T.clamp(0, 1) * 255).round().to(torch.uint8)
