"""Teachers by transformers: vision transformers, convolutional networks, the image towers of CLIP and SigLIP."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..errors import UserError, require
from ..runs.sources import HUB
from .base import Teacher

TRANSFORMERS = "transformers:"


class Transformers(Teacher):
    """The patch tokens of a model's last layer after its final norm, or the last feature map. No code of a repository
    is run.

    Args:
        name: a folder, or ORGANIZATION/NAME of the hub. weights: another one, with the same meaning, or hf-hub:NAME.
    """

    def __init__(self, name: str, grid: tuple[int, int], weights: str | None = None, resize: bool = False):
        transformers = require("transformers", "teachers", f"The teacher {TRANSFORMERS}{name}")
        place = (weights or name).removeprefix(HUB)
        seen = transformers.AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
        super().__init__(tuple(seen.image_mean), tuple(seen.image_std))
        net = transformers.AutoModel.from_pretrained(place, trust_remote_code=False)
        self.net = getattr(net, "vision_model", net).eval()  # of CLIP and SigLIP only the tower for images
        self.resizes = "interpolate_pos_encoding" in inspect.signature(self.net.forward).parameters
        size = getattr(self.net.config, "image_size", None) or 224
        self.input_size, self.resize = size if isinstance(size, int) else size[0], resize
        with torch.no_grad():
            _, self.dim, height, _ = self.features(torch.zeros(1, 3, self.input_size, self.input_size)).shape
        self.patch_size = self.input_size // height
        size = grid[0] * self.patch_size
        if size != self.input_size and not resize:
            try:
                with torch.no_grad():
                    self.features(torch.zeros(1, 3, size, size))
            except Exception as error:  # every model has its own for another image size
                raise UserError(
                    f"{TRANSFORMERS}{name} reads {self.input_size} pixels and not {size} ({error}). Choose another "
                    "--image-size, or give --teacher-resize, by which its features are interpolated."
                ) from error

    def features(self, images: Tensor) -> Tensor:
        other = images.shape[-1] != self.input_size
        options = {"interpolate_pos_encoding": True} if other and self.resizes else {}
        found = self.net(pixel_values=images, **options).last_hidden_state
        if found.ndim == 4:
            return found
        if self.net.config.model_type == "clip_vision_model":  # whose own last norm is for its CLS token
            found = self.net.post_layernorm(found)
        side = images.shape[-1] // getattr(self.net.config, "patch_size", images.shape[-1])
        if side**2 > found.shape[1]:  # of pyramids, whose patches were merged
            side = round(found.shape[1] ** 0.5)
        return found[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))  # without CLS token and registers
