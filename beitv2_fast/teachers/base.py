"""What every teacher is: a frozen network with patch features of one width."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UserError
from ..models.vit import convert_products, require_floating
from ..runs.checkpoints import read_weights
from .torchscript import is_torchscript, read_torchscript


class Teacher(nn.Module):
    """A frozen network, its input statistics, feature width ``dim`` and ``patch_size``, the pixels between features.

    It reads images of as many patches as there are features wanted, its positions interpolated. With ``resize`` it
    reads them at its own ``input_size``, and its features are interpolated (bicubic) to the grid that is wanted.

    Subclasses give ``features(normalized images) -> [B, C, h, w]``.
    """

    dim: int
    patch_size: int
    input_size: int
    resize: bool = False
    mean: Tensor
    std: Tensor
    dtype: torch.dtype | None = None  # of autocast; None: none, whatever is around the call

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        with torch.autocast(images.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.patches(images, grid)

    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What a call gives, with a gradient, and under whatever autocast there is."""
        require_floating(images)
        size = (self.input_size,) * 2 if self.resize else (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.features((images - self.mean) / self.std)
        if self.resize and features.shape[-2:] != grid:
            features = F.interpolate(features.float(), grid, mode="bicubic", antialias=True).to(features.dtype)
        if features.shape[-2:] != grid:
            raise UserError(
                f"the teacher {type(self).__name__} gives a grid of {tuple(features.shape[-2:])} features, the "
                f"tokenizer has {grid} patches. Choose --image-size and --patch-size so that both have the same grid, "
                "or give --teacher-resize, by which the features are interpolated."
            )
        return features.flatten(2).transpose(1, 2)

    def frozen(self, dtype: torch.dtype | None = None) -> Teacher:
        """In eval mode, without gradients. With a dtype: under autocast to it (see ``convert_products``)."""
        self.dtype = dtype
        if dtype is not None:
            convert_products(self, dtype)
        return self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """A hash of all weights and of the input statistics: features of two teachers with the same are the same."""
        how = (self.mean.tolist(), self.std.tolist(), str(self.dtype), *(["resized"] if self.resize else []))
        digest = hashlib.sha256(repr(how).encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def read_file(weights: str | Path, teacher: str, source: str) -> dict[str, Any]:
    """The state dict in a weights file; no code in it is run. A missing file: where to get it."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path} (weights of the teacher {teacher}): {source}.")
    return read_torchscript(path) if is_torchscript(path) else read_weights(path)
