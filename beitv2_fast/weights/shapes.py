"""The config of a model, read off the shapes of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..models.classifier import ClassifierConfig
from ..models.student import StudentConfig
from ..models.tokenizer import TokenizerModelConfig
from ..models.vit import SIZES, ViTConfig
from . import grid_side, kind_of
from .names import BIAS_TABLE

ModelConfig = TokenizerModelConfig | StudentConfig | ClassifierConfig
VIT_FIELD: dict[type[ModelConfig], str]
VIT_FIELD = {TokenizerModelConfig: "encoder", StudentConfig: "vit", ClassifierConfig: "vit"}
HEADS_OF_WIDTH = {size["dim"]: size["heads"] for size in SIZES.values()}
EARLY_LAYERS = {12: 9, 24: 21, 32: 28}  # depth -> layer that the aggregation branch reads


def flatten(config: ModelConfig) -> dict[str, Any]:
    """A model's config as one level of names: those of its ViT and its own."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    vit = values.pop(VIT_FIELD[type(config)])
    return {**{f.name: getattr(vit, f.name) for f in dataclasses.fields(vit)}, **values}


def unflatten(kind: type[ModelConfig], values: Mapping[str, Any]) -> ModelConfig:
    """What ``flatten`` made, as a config again. Names of other models are passed over."""
    vit = {f.name: values[f.name] for f in dataclasses.fields(ViTConfig) if f.name in values}
    own = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
    own[VIT_FIELD[kind]] = ViTConfig(**vit)
    return kind(**own)


def describe(ours: Mapping[str, Tensor], known: Mapping[str, Any] | None = None) -> ModelConfig:
    """The config of the model whose state dict this is (names of ours, see ``convert``).

    Args:
        known: values that shapes do not tell, under the names of ``flatten``: eps, drop_path, the initial layer_scale,
            early_layer and, without bias tables, heads. Where they are missing those of ViT-S, B, L and H are taken:
            eps 1e-6, heads by the width, early_layer 9 of 12, 21 of 24, 28 of 32 (three quarters of another depth).

    Raises:
        CheckpointError: tensors that such a model has are missing, or their shapes do not belong together.
    """
    if "decode_head.conv_seg.weight" in ours:
        raise CheckpointError("these are the weights of a segmenter, which train/segment.py --weights reads.")
    known = dict(known or {})
    with _explained(kind := kind_of(ours)):
        if kind == "tokenizer":
            found = {**_vit(ours, "encoder.", known), **_tokenizer(ours)}
            return unflatten(TokenizerModelConfig, {**known, **found})
        found = _vit(ours, "", known)
        if kind == "classifier":
            classes = {"num_classes": ours["head.weight"].shape[0]}
            return unflatten(ClassifierConfig, {**known, **found, **classes})
        return unflatten(StudentConfig, {**known, **found, **_student(ours, found["depth"], known)})


def describe_backbone(ours: Mapping[str, Tensor], known: Mapping[str, Any] | None = None) -> ViTConfig:
    """As ``describe``, of only the ViT (a tokenizer's encoder): of weights without a head, too."""
    known = dict(known or {})
    with _explained(kind := kind_of(ours)):
        values = {**known, **_vit(ours, "encoder." if kind == "tokenizer" else "", known)}
        return ViTConfig(**{f.name: values[f.name] for f in dataclasses.fields(ViTConfig) if f.name in values})


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"these are no complete weights of a {kind}: {error} is missing. A classifier can start from a backbone: "
            'create_model("beitv2_base_classifier", ...), train/finetune.py --weights.'
        ) from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the shapes of these weights fit no {kind}: {error}.") from error


def count_blocks(names: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {n.removeprefix(prefix).split(".", 1)[0] for n in names if n.startswith(prefix)}
    return len(numbers)


def _vit(ours: Mapping[str, Tensor], prefix: str, known: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_channels, patch_size, _ = ours[f"{prefix}patch_embed.proj.weight"].shape
    values: dict[str, Any] = {
        "dim": dim,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "depth": count_blocks(ours, f"{prefix}blocks."),
        "mlp_ratio": ours[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "layer_scale": (known.get("layer_scale") or 0.1) if f"{prefix}blocks.0.gamma_1" in ours else 0.0,
    }
    tables = {
        "shared_relative": f"{prefix}rel_pos_bias.{BIAS_TABLE}",
        "relative": f"{prefix}blocks.0.attn.{BIAS_TABLE}",
    }
    absolute = f"{prefix}pos_embed" in ours
    for position, name in tables.items():
        if name in ours:
            side = grid_side(name, ours[name])
            position = f"absolute_{position}" if absolute else position
            return {**values, "position": position, "heads": ours[name].shape[1], "image_size": side * patch_size}
    values["heads"] = known.get("heads") or _heads(dim)
    if absolute:
        patches = ours[f"{prefix}pos_embed"].shape[1] - 1
        side = round(patches**0.5)
        if side**2 != patches:
            raise CheckpointError(f"{prefix}pos_embed has positions for {patches} patches, which form no square.")
        return {**values, "position": "absolute", "image_size": side * patch_size}
    return {**values, "position": "none", "image_size": known.get("image_size", 14 * patch_size)}


def _heads(dim: int) -> int:
    if dim not in HEADS_OF_WIDTH:
        raise CheckpointError(
            f"the number of attention heads does not show in these weights (width {dim}, no bias tables). "
            "Give it: create_model(..., heads=N)."
        )
    return HEADS_OF_WIDTH[dim]


def _tokenizer(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    num_codes, code_dim = ours["quantize.codebook"].shape
    return {
        "decoder_depth": count_blocks(ours, "decoder.blocks."),
        "num_codes": num_codes,
        "code_dim": code_dim,
        "teacher_dim": ours["decode_task_layer.2.weight"].shape[0],
    }


def _student(ours: Mapping[str, Tensor], depth: int, known: Mapping[str, Any]) -> dict[str, Any]:
    early = known.get("early_layer") or depth + 1
    return {
        "num_codes": ours["lm_head.weight"].shape[0],
        "aggregation_depth": count_blocks(ours, "cls_pt_layers."),
        "shared_head": "cls_pt_lm_head.weight" not in ours,
        "early_layer": early if early <= depth else EARLY_LAYERS.get(depth, max(round(0.75 * depth), 1)),
    }
