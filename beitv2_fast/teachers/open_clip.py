"""Teachers by open_clip: OpenAI's CLIP, which is the paper's, and any other model that it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, require
from ..runs.checkpoints import load_model
from ..runs.sources import HUB
from . import networks
from .base import Teacher, read_file

OPEN_CLIP = "open_clip:"


class OpenCLIP(Teacher):
    """An image tower of open_clip: of a vision transformer the patch tokens after the final norm, times the projection
    (512 wide for B/16); of others (timm's, SigLIP among them, ResNets) the last feature map.

    Args:
        name, tag: of open_clip. weights: instead of the tag: a file (OpenAI's TorchScript archive, whose code is not
            run, or open_clip's state dict), another tag, or hf-hub:ORGANIZATION/NAME.
    """

    source = (
        "open_clip fetches them by the hub name 'openai' (the default, without --teacher-weights). Without a network: "
        "open_clip_model.safetensors from https://huggingface.co/timm/vit_base_patch16_clip_224.openai, or ViT-B-16.pt "
        "from https://github.com/openai/CLIP"
    )

    def __init__(self, name: str, tag: str, grid: tuple[int, int], weights: str | None = None, resize: bool = False):
        open_clip = require("open_clip", "teachers", f"The teacher {OPEN_CLIP}{name}")
        weights = weights or tag
        if not weights.startswith(HUB):
            self._check_name(open_clip, name, weights)
        model = self._model(open_clip, name, weights, None)
        visual = model.visual
        super().__init__(tuple(visual.image_mean or networks.CLIP_MEAN), tuple(visual.image_std or networks.CLIP_STD))
        self.projected = isinstance(visual, open_clip.transformer.VisionTransformer) and visual.attn_pool is None
        self.visual, self.resize = self._ready(visual), resize
        self.input_size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        with torch.no_grad():
            _, self.dim, height, _ = self.features(torch.zeros(1, 3, self.input_size, self.input_size)).shape
        self.patch_size = self.input_size // height
        size = grid[0] * self.patch_size
        if size != self.input_size and not resize:
            self.visual = self._ready(self._model(open_clip, name, weights, size).visual)

    @staticmethod
    def _check_name(open_clip: Any, name: str, weights: str) -> None:
        if name not in open_clip.list_models():
            near = ", ".join(other for other in open_clip.list_models() if other.lower().startswith(name.lower()[:5]))
            raise UserError(f"open_clip has no model {name!r}{f'; near: {near}' if near else ''}.")
        if not weights:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
            raise UserError(f"{OPEN_CLIP}{name} needs its weights' tag, {OPEN_CLIP}{name}@TAG. There are: {tags}.")

    def _model(self, open_clip: Any, name: str, weights: str, size: int | None) -> Any:
        """With another image size the positions are interpolated."""
        options = {} if size is None else {"force_image_size": size}
        if weights.startswith(HUB):
            return open_clip.create_model(weights, **options)
        if weights in open_clip.list_pretrained_tags_by_model(name):
            tag = open_clip.get_pretrained_cfg(name, weights)  # OpenAI's weights have a GELU of their own
            gelu = {"force_quick_gelu": True} if tag.get("quick_gelu") else {}
            return open_clip.create_model(name, pretrained=weights, **gelu, **options)
        state = _clip_state(read_file(weights, f"{OPEN_CLIP}{name}", self.source))
        model = open_clip.create_model(name, **options)
        open_clip.model.resize_pos_embed(state, model)
        load_model(model.visual, {name.removeprefix("visual."): t for name, t in state.items()}, weights)
        return model

    def _ready(self, visual: Any) -> Any:
        if self.projected:
            visual.output_tokens = True
        return visual.eval()

    def features(self, images: Tensor) -> Tensor:
        if self.projected:
            tokens = self.visual(images)[1] @ self.visual.proj  # [B, N, 512]
            return tokens.transpose(1, 2).unflatten(2, (round(tokens.shape[1] ** 0.5), -1))
        found = self.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
        )
        return found["image_intermediates"][-1]


def _clip_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The image tower's part of a CLIP state dict, its names beginning with ``visual.``."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    tower = {name: value for name, value in state.items() if name.startswith("visual.")}
    return tower or state
