"""Colour jitter of a batch, with the pixels of PIL's enhancers, which torchvision and the reference implementation use.

With f the factor, truncated to whole levels after each step: brightness f*x; contrast m + f*(x - m), m the mean luma of
the image; saturation g + f*(x - g), g the luma of each pixel.
"""

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
BRIGHTNESS, CONTRAST, SATURATION = range(3)


def color_jitter(pixels: Tensor, steps: np.ndarray, factors: np.ndarray) -> Tensor:
    """Scales brightness, contrast and saturation of each image by its factors, in its order.

    Args:
        pixels: uint8 [B, H, W, 3]. steps: ints [B, S], 0 brightness, 1 contrast, 2 saturation. factors: floats [B, S].

    Returns:
        a new tensor like `pixels`. By PIL on the CPU, where it is twice as fast; by torch elsewhere, within a level
        of it for each step.
    """
    if pixels.device.type != "cpu":
        return jitter_batched(pixels, steps, factors)
    jittered = []
    for image, kinds, values in zip(pixels.numpy(), steps.tolist(), factors.tolist(), strict=True):
        image = Image.fromarray(image)
        for kind, factor in zip(kinds, values, strict=True):
            image = ENHANCERS[kind](image).enhance(factor)
        jittered.append(np.asarray(image))
    return torch.from_numpy(np.stack(jittered))


def jitter_batched(pixels: Tensor, steps: np.ndarray, factors: np.ndarray) -> Tensor:
    """`color_jitter` in torch ops: every step is x <- base + f*(x - base), with base 0, m or g."""
    x = pixels.float()
    weights = torch.tensor(LUMA).to(x.device, non_blocking=True)
    kinds, values = (torch.from_numpy(a).to(x.device, non_blocking=True) for a in (steps, factors.astype(np.float32)))
    for step in range(steps.shape[1]):
        kind, factor = (a[:, step, None, None, None] for a in (kinds, values))  # [B, 1, 1, 1]
        luma = (x * weights).sum(-1, keepdim=True).round_()
        base = torch.where(kind == CONTRAST, luma.mean((1, 2, 3), keepdim=True).round_(), luma)
        base = torch.where(kind == BRIGHTNESS, 0, base)
        x = (x - base).mul_(factor).add_(base).floor_().clamp_(0, 255)
    return x.to(torch.uint8)
