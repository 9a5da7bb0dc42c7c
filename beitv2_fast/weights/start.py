"""From pre-trained weights to the start of fine-tuning (arXiv 2208.06366 section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.positions import resize_positions
from ..runs.checkpoints import compact, load_model
from . import kind_of
from .names import BIAS_TABLE
from .shapes import count_blocks

# what a student has for pre-training alone
LEFT_BEHIND = ("mask_token", "norm.", "lm_head.", "cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head.")
NEW = ("fc_norm.", "head.")


def to_classifier(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a student or a tokenizer under a classifier's names, with no head.

    A bias table that a student's layers share is copied into every layer, which then learns its own. What serves the
    pre-training alone is left behind: mask token, final norm, heads, aggregation branch. Of a tokenizer the encoder
    remains, with its norm, and reads images normalised as a student's instead of in [-1, 1]. A classifier's own weights
    come back as they are.

    Args:
        ours: state dict under our names (see ``convert``).
    """
    kind = kind_of(ours)
    if kind == "classifier":
        return dict(ours)
    if kind == "tokenizer":
        encoder = {n.removeprefix("encoder."): value for n, value in ours.items() if n.startswith("encoder.")}
        return reading_normalised(encoder)
    result = {name: value for name, value in ours.items() if not name.startswith(LEFT_BEHIND)}
    shared = result.pop(f"rel_pos_bias.{BIAS_TABLE}", None)
    if shared is not None:
        for layer in range(count_blocks(result, "blocks.")):
            result[f"blocks.{layer}.attn.{BIAS_TABLE}"] = shared.clone()
    return result


def reading_normalised(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ViT that read images in [-1, 1] -> the same function of images normalised by ImageNet's statistics.

    2x - 1 = 2 std y + 2 mean - 1 for y = (x - mean) / std: both numbers go into the patch embedding.
    """
    from ..models.vit import IMAGENET_MEAN, IMAGENET_STD

    weight, bias = (encoder[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
    mean, std = (weight.new_tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    scaled, shift = weight.double() * 2 * std, (weight.double() * (2 * mean - 1)).sum((1, 2, 3))
    new = {"patch_embed.proj.weight": scaled.to(weight), "patch_embed.proj.bias": (bias.double() + shift).to(bias)}
    return {**encoder, **new}


def start_classifier(model: nn.Module, ours: Mapping[str, Tensor], source: str) -> list[str]:
    """Load a student's, a tokenizer's or a classifier's weights into a ``Classifier`` for fine-tuning.

    The head, and the norm before it, keep their initial values where the weights have none; so does a head for another
    number of classes. Positions are resized to the model's image size. Everything else has to fit.

    Returns:
        the names of the parameters that keep their initial values.

    Raises:
        CheckpointError: anything but these is missing, unexpected or of another shape; it names every entry.
    """
    state, own = resize_positions(to_classifier(ours), model), model.state_dict()
    head = state.get("head.weight")
    if head is not None and head.shape != own["head.weight"].shape:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    new = [name for name in own if name.startswith(NEW) and name not in state]
    load_model(model, {**state, **{name: own[name] for name in new}}, source)
    return new


def describe_new(new: list[str]) -> str:
    """A sentence for the log."""
    return f"not in the weights, so as initialised: {', '.join(compact(new))}" if new else "all weights were loaded"


def check_backbone(kind: str, wanted: str) -> None:
    """Only a classifier can start from another kind of model."""
    if kind != wanted and wanted != "classifier":
        raise CheckpointError(
            f"these are the weights of a {kind}, but a {wanted} was asked for. Name a {kind}, or use other weights."
        )
