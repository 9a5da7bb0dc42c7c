"""Decoded images in the memory of one device, which cuts the views' pictures out of them, a batch at once.

To resize along one axis is to multiply by a matrix, which follows from where the crop begins and how long it is. So a
batch of crops, of whatever sizes, is two batched products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .views import Pictures, View

MAX_SIDE = 512  # pixels: every image has the room of the largest, and a batch of them lies on the device as floats
SHARE = 1 / 4
AUTO_BYTES = 8e9  # about what 16 cores decode in ten seconds


class StoredImages:
    """Images of at most ``MAX_SIDE`` pixels a side, 3 bytes per pixel, each filled up to the largest sides of all.

    Attributes:
        pixels: uint8 [images, H, 3, W] on the device.
        sizes: int64 [images, 2], widths and heights.

    Args:
        images: uint8 [H, W] (gray) or [H, W, 3] each.

    Raises:
        UserError: they are too large, or too many for the device (``cannot_be_stored``).
    """

    def __init__(self, images: Iterable[np.ndarray], device: torch.device) -> None:
        images = list(images)
        self.sizes = np.array([image.shape[1::-1] for image in images])
        if why := cannot_be_stored(self.sizes, device):
            raise UserError(f"--loader gpu: {why}. Leave it out.")
        width, height = self.sizes.max(0).tolist()
        self.pixels = torch.empty(len(images), height, 3, width, dtype=torch.uint8, device=device)
        for first in range(0, len(images), 1024):
            some = images[first : first + 1024]
            padded = np.zeros((len(some), height, width, 3), np.uint8)
            for to, image in zip(padded, some, strict=True):
                to[: image.shape[0], : image.shape[1]] = image if image.ndim == 3 else image[..., None]
            self.pixels[first : first + len(some)] = torch.from_numpy(padded).to(device).transpose(2, 3)

    def cut(self, view: View, draws: dict[str, Tensor]) -> Pictures:
        """The view's pictures, uint8 [B, size, size, 3], of the images draws["index"] [B], as ``views.cut_out`` makes
        them of PIL images, widths before heights and 8 bits between: the same levels but where a rounding is close,
        or where Pillow (from 13, of what shrinks more in height) resizes the heights first: there by up to a level, and
        by more where the filter overshoots black or white.

        draws: those of the view, "index" and "size" [B, 2] (width, height), on the device.
        """
        height, _, width = self.pixels.shape[1:]
        pixels = self.pixels[draws["index"]].flatten(1, 2).float()  # [B, H*3, W]
        box = draws["box"]
        if view.resizes_first:
            start, length, first, resized = torch.zeros_like(draws["size"]), draws["size"], box[:, :2], draws["resized"]
        else:
            start, length, first, resized = box[:, :2], box[:, 2:] - box[:, :2], torch.zeros_like(box[:, :2]), None
        pictures = {}
        for name, picture in view.pictures.items():
            size = picture.size
            total = torch.full_like(length, size) if resized is None else resized
            weights = resampling(start, length, first, total, size, max(width, height), KERNELS[picture.resample])
            columns = torch.where(draws["flip"][:, None, None], weights[:, 0].flip(1), weights[:, 0])
            # Products in bf16 would be off by levels.
            with torch.autocast(pixels.device.type, enabled=False):
                x = torch.bmm(pixels, columns[..., :width].mT)  # [B, H*3, size]
                x = x.add_(0.5).floor_().clamp_(0, 255).view(-1, height, 3 * size)
                x = torch.bmm(weights[:, 1, :, :height], x)
            x = x.add_(0.5).clamp_(0, 255).to(torch.uint8)
            pictures[name] = x.view(-1, size, 3, size).transpose(2, 3)
        return pictures


def cannot_be_stored(sizes: Sequence[tuple[int, int]] | np.ndarray, device: torch.device) -> str | None:
    """Why images of these sizes (width, height) should not lie decoded on the device; None if they may."""
    if (longest := np.asarray(sizes).max()) > MAX_SIDE:
        return f"an image has a side of {longest} pixels, and at most {MAX_SIDE} are stored"
    needed = stored_bytes(sizes)
    if needed > (most := room(device)):
        return f"the decoded images take {needed / 1e9:.2f} GB, and there is room for {most / 1e9:.2f}"
    return None


def room(device: torch.device) -> float:
    """Bytes that may be kept on a device beside a training: a quarter of what is free, of a CPU's of all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * SHARE
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * SHARE


def stored_bytes(sizes: Sequence[tuple[int, int]] | np.ndarray) -> int:
    return 3 * len(sizes) * int(np.max(sizes, axis=0).prod())


def resampling(
    start: Tensor, length: Tensor, first: Tensor, total: Tensor, size: int, extent: int, kernel: tuple[int, Callable]
) -> Tensor:
    """Matrices that resize pixels start .. start + length - 1 of an axis to ``total`` ones, rows first .. first + size
    - 1 of each: ints [...] -> float32 [..., size, extent], whose rows add up to 1.

    With s = length / total, the weight of pixel x in pixel o of the result is that of PIL, without its rounding to 22
    bits: kernel((x + 1/2 - start - (o + 1/2) s) / max(s, 1)), 0 for x outside.
    """
    support, weight = kernel
    scale = length.double() / total
    places = torch.arange(size, device=start.device) + 0.5
    centers = start[..., None] + (first[..., None] + places) * scale[..., None]  # [..., size]
    whole = centers.floor()
    x = torch.arange(extent, device=start.device)
    # Small numbers are exact in fp32, so that the difference has its precision.
    distance = (x + 0.5 - whole[..., None].float()).sub_((centers - whole).float()[..., None])
    distance = distance.div_(scale.clamp(min=1).float()[..., None, None]).abs_().clamp_(max=support)
    inside = (x >= start[..., None]) & (x < (start + length)[..., None])
    weights = weight(distance).mul_(inside[..., None, :])
    return weights.div_(weights.sum(-1, keepdim=True))


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2; distances in [0, 2]."""
    outer, inner = 2 - distance, (1 - distance).clamp_(min=0)
    return (outer.square() * (outer - 1)).mul_(0.5).add_(inner.square() * (1 - 2 * inner))


def _lanczos(distance: Tensor) -> Tensor:
    return torch.sinc(distance) * torch.sinc(distance / 3)


KERNELS = {"bicubic": (2, _bicubic), "lanczos": (3, _lanczos)}  # by the names of ``views.RESAMPLING``: support, weight
