"""Where a training starts (arXiv 2208.06366 section 3.2): any model's weights in a classifier or a segmenter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config.downstream import StartConfig
from ..errors import UserError
from ..models.positions import resize_positions
from ..models.vit import IMAGENET_MEAN, IMAGENET_STD, ViTConfig
from ..runs.checkpoints import compact, load_model
from . import kind_of
from .build import trained_vit
from .names import BIAS_TABLE, SEGMENTER_HEADS
from .shapes import count_blocks

SHAPE = ("dim", "depth", "heads", "patch_size")
BACKBONE = ("cls_token", "pos_embed", "patch_embed.", "rel_pos_bias.", "blocks.")
SHARED_TABLE = f"rel_pos_bias.{BIAS_TABLE}"
CLASSIFIER_HEAD = ("fc_norm.", "head.")
# what a student has only for its pre-training
LEFT_BEHIND = ("mask_token", "norm.", "lm_head.", "cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head.")
LAST_LAYERS = ("head.", "decode_head.conv_seg.", "auxiliary_head.conv_seg.")  # as wide as there are classes


def to_classifier(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a student or a tokenizer under a classifier's names, with no head.

    A bias table that a student's layers share is copied into every layer, which then learns its own. What only serves
    the pre-training is left behind: mask token, final norm, heads, aggregation branch. Of a tokenizer the encoder
    remains, with its norm, and reads images normalized as a student's instead of in [-1, 1]. The weights of a
    classifier or a segmenter come back as they are.

    Args:
        ours: state dict under our names (see ``convert``).
    """
    kind = kind_of(ours)
    if kind == "classifier":
        return dict(ours)
    if kind == "tokenizer":
        encoder = {n.removeprefix("encoder."): value for n, value in ours.items() if n.startswith("encoder.")}
        return reading_normalized(encoder)
    return _own_tables({name: value for name, value in ours.items() if not name.startswith(LEFT_BEHIND)})


def _own_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    shared = state.pop(SHARED_TABLE, None)
    if shared is not None:
        for layer in range(count_blocks(state, "blocks.")):
            state[f"blocks.{layer}.attn.{BIAS_TABLE}"] = shared.clone()
    return state


def reading_normalized(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ViT that read images in [-1, 1] -> the same function of images normalized by ImageNet's statistics.

    2x - 1 = 2 std y + 2 mean - 1 for y = (x - mean) / std: both numbers go into the patch embedding.
    """
    weight, bias = (encoder[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
    mean, std = (weight.new_tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    scaled, shift = weight.double() * 2 * std, (weight.double() * (2 * mean - 1)).sum((1, 2, 3))
    new = {"patch_embed.proj.weight": scaled.to(weight), "patch_embed.proj.bias": (bias.double() + shift).to(bias)}
    return {**encoder, **new}


def own_positions(backbone: ViTConfig) -> ViTConfig:
    """The backbone with a bias table in every block where all blocks shared one."""
    return dataclasses.replace(backbone, position=backbone.position.replace("shared_", ""))


def start_config(config: StartConfig, backbone: ViTConfig) -> ViTConfig:
    """The ViT of a training that starts from weights of this shape, at its own image size and drop path.

    Raises:
        UserError: the options say another shape.
    """
    check_shape(config, backbone)
    return trained_vit(config, own_positions(backbone))


def check_shape(config: StartConfig, found: object, names: Iterable[str] = SHAPE) -> None:
    """UserError if ``found``, a config, has other values of these names than the options."""
    wrong = [f"--{n.replace('_', '-')} {getattr(found, n)}" for n in names if getattr(found, n) != getattr(config, n)]
    if wrong:
        raise UserError(
            f"{config.weights} has another shape than these options: give it as {' '.join(wrong)}, choose the --preset "
            "of that size, or name other weights."
        )


def start_from(model: nn.Module, ours: Mapping[str, Tensor], source: str) -> list[str]:
    """Load the weights of a student, a tokenizer, a classifier or a segmenter into a ``Classifier`` or a ``Segmenter``.

    What is no backbone keeps its initial values where the weights have none; so do last layers for another number of
    classes. Positions are resized to the model's image size. Everything else has to fit.

    Returns:
        the names of the parameters and buffers that keep their initial values.

    Raises:
        CheckpointError: anything but these is missing, unexpected or of another shape; it names every entry.
    """
    own, state = model.state_dict(), to_classifier(ours)
    if SHARED_TABLE not in own:
        state = _own_tables(state)
    other_heads = CLASSIFIER_HEAD if LAST_LAYERS[1] + "weight" in own else (*CLASSIFIER_HEAD, *SEGMENTER_HEADS)
    state = {name: v for name, v in state.items() if name in own or not name.startswith(other_heads)}
    state = {
        name: v for name, v in state.items() if not name.startswith(LAST_LAYERS) or v.shape == own.get(name, v).shape
    }
    new = [name for name in own if not name.startswith(BACKBONE) and name not in state]
    load_model(model, {**resize_positions(state, model), **{name: own[name] for name in new}}, source)
    return new


def describe_new(new: list[str]) -> str:
    """A sentence for the log."""
    return f"not in the weights, so as initialized: {', '.join(compact(new))}" if new else "all weights were loaded"


start_classifier = start_from  # its name in earlier versions
