"""transformers' config.json and ours, in both directions. transformers itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.student import StudentConfig
from ..models.tokenizer import TokenizerModelConfig
from ..models.vit import IMAGENET_MEAN, IMAGENET_STD
from .shapes import ModelConfig, flatten

# BeitConfig's name -> ours, for what has the same meaning
SAME_MEANING = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "layer_norm_eps": "eps",
    "layer_scale_init_value": "layer_scale",
    "drop_path_rate": "drop_path",
    "initializer_range": "init_std",
}
POSITION_FLAGS = {
    "use_absolute_position_embeddings": "absolute",
    "use_shared_relative_position_bias": "shared_table",
    "use_relative_position_bias": "own_tables",
}


def to_transformers(config: ModelConfig) -> dict[str, Any]:
    """config.json of BeitForMaskedImageModeling (students) or BeitForImageClassification (classifiers)."""
    if isinstance(config, TokenizerModelConfig):
        raise CheckpointError("transformers has no class for a tokenizer")
    vit, student = config.vit, isinstance(config, StudentConfig)
    values: dict[str, Any] = {
        "architectures": ["BeitForMaskedImageModeling" if student else "BeitForImageClassification"],
        "model_type": "beit",
        **{theirs: getattr(vit, ours) for theirs, ours in SAME_MEANING.items()},
        **{theirs: getattr(vit, ours) for theirs, ours in POSITION_FLAGS.items()},
        "intermediate_size": int(vit.dim * vit.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_mask_token": student,
        "use_mean_pooling": True,  # BeitModel's own norm is then none: a student's is in its head
    }
    if isinstance(config, StudentConfig):
        return {**values, "vocab_size": config.num_codes}
    labels = [f"LABEL_{i}" for i in range(config.num_classes)]
    return {**values, "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def preprocessor(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json of BeitImageProcessor: the images as BEiT v2 was trained on them."""
    side = flatten(config)["image_size"]
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_reduce_labels": False,
    }


def from_transformers(file: Path) -> dict[str, Any]:
    """What a config.json of transformers says about a model, under our names (see ``shapes.flatten``).

    Raises:
        CheckpointError: it is no config of a Beit model.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). Restore it, or name the weights file instead."
        ) from error
    if not isinstance(values, dict) or values.get("model_type") != "beit":
        raise CheckpointError(f'{file} is no config of a Beit model (its model_type is not "beit").')
    if values.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{file}: hidden_act is {values['hidden_act']!r}, but the models here have gelu.")
    known = {ours: values[theirs] for theirs, ours in SAME_MEANING.items() if theirs in values}
    known.setdefault("eps", 1e-12)  # BeitConfig's default
    sides = {name: known[name] for name in ("image_size", "patch_size") if isinstance(known.get(name), list)}
    for name, (height, width) in sides.items():
        if height != width:
            raise CheckpointError(f"{file}: {name} is {height}x{width}, but the models here read square images.")
        known[name] = height
    return known
