"""Models by name: ``create_model("beitv2_base", checkpoint="FILE")``."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

from ..config.downstream import FinetuneConfig
from ..config.options import SOURCE
from ..config.training import PretrainConfig, TokenizerConfig, TrainConfig
from ..errors import CheckpointError, UserError
from ..models.classifier import Classifier, ClassifierConfig
from ..models.positions import resize_positions
from ..models.student import Student, StudentConfig
from ..models.tokenizer import Tokenizer, TokenizerModelConfig
from ..models.vit import SIZES, ViTConfig
from ..runs.checkpoints import load_model
from ..runs.folder import CONFIG, is_run_folder, read_config
from ..runs.sources import PUBLISHED, is_remote, locate
from . import kind_of
from .build import load_run_model, run_config
from .files import Loaded, read, read_training
from .shapes import EARLY_LAYERS, ModelConfig, flatten, unflatten
from .start import describe_new, own_positions, start_from

_log = logging.getLogger(__name__)

MODEL_CLASSES: dict[type[ModelConfig], Any] = {
    TokenizerModelConfig: Tokenizer,
    StudentConfig: Student,
    ClassifierConfig: Classifier,
}
CONFIG_CLASSES: dict[type[ModelConfig], type[TrainConfig]] = {
    TokenizerModelConfig: TokenizerConfig,
    StudentConfig: PretrainConfig,
    ClassifierConfig: FinetuneConfig,
}
LAYER_SCALE = {"small": 0.1, "base": 0.1, "large": 1e-5, "huge": 1e-5}
# what no weight depends on, or what loading adapts
FREE: tuple[str, ...]
FREE = ("image_size", "num_classes", "layer_scale", "drop_path", "eps", "init_std", "early_layer", "decay")
FREE += ("commitment_weight", "kmeans_init", "dead_after", "attention", "checkpointing")
DEFINING = ("dim", "depth", "heads", "patch_size")  # what a name stands for; the rest a checkpoint may have otherwise


def _tokenizer(decoder_depth: int, teacher_dim: int) -> TokenizerModelConfig:
    return TokenizerModelConfig(ViTConfig(position="absolute"), decoder_depth, teacher_dim=teacher_dim)


def _students() -> dict[str, StudentConfig]:
    return {
        f"beitv2_{size}": StudentConfig(
            ViTConfig(**shape, layer_scale=LAYER_SCALE[size]), early_layer=EARLY_LAYERS[shape["depth"]]
        )
        for size, shape in SIZES.items()
    }


def _classifiers() -> dict[str, ClassifierConfig]:
    return {
        f"beitv2_{size}_classifier": ClassifierConfig(
            ViTConfig(position="relative", **shape, layer_scale=LAYER_SCALE[size])
        )
        for size, shape in SIZES.items()
    }


MODELS: dict[str, ModelConfig] = {
    "vqkd_base_clip": _tokenizer(3, 512),
    "vqkd_base_clip_1": _tokenizer(1, 512),
    "vqkd_base_dino": _tokenizer(1, 768),
    "vqkd_base_dino_3": _tokenizer(3, 768),
    **_students(),
    **_classifiers(),
}
# the names of the reference's and timm's models; a published name without weights stands for their shape
ALIASES = {
    **{name: published.model for name, published in PUBLISHED.items()},
    "beit_base_patch16_224_8k_vocab_cls_pt": "beitv2_base",
    "beit_large_patch16_224_8k_vocab_cls_pt": "beitv2_large",
    "beitv2_base_patch16_224": "beitv2_base_classifier",
    "beitv2_large_patch16_224": "beitv2_large_classifier",
}


def list_models() -> list[str]:
    """The names that ``create_model`` knows, without aliases."""
    return list(MODELS)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The config of a name, with some of its values replaced: those of its ViT and its own, all at one level.

    Raises:
        UserError: an unknown name or value, or values that make no model.
    """
    config = MODELS.get(ALIASES.get(name, name))
    if config is None:
        raise UserError(f"there is no model {name!r}. Choose one of: {', '.join((*MODELS, *ALIASES))}.")
    published = PUBLISHED.get(name)
    if published is not None and published.classes:
        overrides = {"num_classes": published.classes, **overrides}
    return _replace(config, overrides, f"create_model({name!r})")


def create_model(
    name: str | None = None, checkpoint: str | Path | None = None, source: str | None = None, **overrides: Any
) -> Tokenizer | Student | Classifier:
    """A model, in eval mode; with a checkpoint, its weights.

    With a checkpoint the model's shape is that of the checkpoint. The name has to agree with it in kind, width, depth,
    heads and patch size. ``overrides`` that differ from the checkpoint are an error, but for ``image_size`` (positions
    and bias tables are resized), values that no weight depends on (``drop_path``, ``eps``, ``early_layer``, ...) and a
    classifier's ``num_classes`` (a new head). A classifier may start from a student's or a tokenizer's checkpoint, or
    from a backbone's without a head: its bias table goes to every layer, head and norm are new. What is new is logged
    as a warning.

    Args:
        name: see ``list_models``; None: whatever model the checkpoint holds. A published name, a URL or ``hf-hub:...``
            without a checkpoint is one itself.
        checkpoint: a .safetensors, .pth or .pt file in any format of ``convert``, a folder of transformers, timm or
            ``save_pretrained``, a run folder of this package, a published name, a URL, or
            ``hf-hub:ORGANIZATION/NAME``: see ``runs.sources``.
        source: the checkpoint's format, if it should not be recognized.
        overrides: values of the config, e.g. ``image_size=384, drop_path=0.1, num_classes=10``.

    Raises:
        UserError: an unknown name or value. CheckpointError: weights that cannot be read or do not fit; it names every
            missing, unexpected and reshaped entry.
    """
    if name is None and checkpoint is None:
        raise UserError(f"create_model needs a name or a checkpoint. Names: {', '.join(MODELS)}.")
    if checkpoint is None and name is not None and (name in PUBLISHED or is_remote(name)):
        name, checkpoint = (name if name in PUBLISHED else None), name
    named = model_config(name, **overrides) if name is not None else None
    if checkpoint is None:
        assert named is not None
        model: Tokenizer | Student | Classifier = MODEL_CLASSES[type(named)](named).eval()
        return model
    loaded = read(checkpoint, source)
    try:
        return _load(name, named, loaded, str(checkpoint), overrides)
    except CheckpointError as error:
        raise error if str(checkpoint) in str(error) else CheckpointError(f"{checkpoint}: {error}") from error


def open_model(
    source: str | Path, image_size: int | None = None, *, average: bool = False
) -> tuple[Tokenizer | Student | Classifier, TrainConfig | None]:
    """The model of any source that ``create_model`` reads, in eval mode, and the config of its training.

    A run folder and a folder of ``save_pretrained`` say it; a published model's is the paper's; of others it is None.

    Args:
        image_size, average: see ``load_run_model``.
    """
    path = locate(source)
    if not path.exists():
        raise UserError(f"{source} is no run folder, and no file either. Train that stage first, or name {SOURCE}.")
    if average or not (path.is_file() or (path / CONFIG).is_file()) or is_run_folder(path):
        return load_run_model(path, image_size, average=average)
    size: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    model = create_model(checkpoint=source, **size)
    config = training_config(source)
    if config is not None:
        config = paper_config(model.config, config)
    return model, config


def training_config(source: str | Path) -> TrainConfig | None:
    """The config alone of ``open_model``; a published model's shape is that of its name, and nothing is fetched."""
    if (published := PUBLISHED.get(str(source))) is not None and not Path(source).exists():
        config = paper_config(model_config(published.model))
        known: dict[str, Any] = {"teacher": published.teacher, "tokenizer": Path(published.tokenizer)}
        return dataclasses.replace(config, **{name: v for name, v in known.items() if hasattr(config, name)})
    path = locate(source)
    if is_run_folder(path):
        return run_config(path)
    return read_training(path) if (path / CONFIG).is_file() else None


def tokenizer_config(source: str | Path) -> TokenizerConfig:
    """``training_config`` of a tokenizer, which says what its teacher was; UserError where there is none."""
    path = Path(source)
    if not (is_remote(path) or path.is_file()) and (is_run_folder(path) or not (path / CONFIG).is_file()):
        return read_config(TokenizerConfig, path)
    config = training_config(source)
    if not isinstance(config, TokenizerConfig):
        raise UserError(
            f"nothing says how the tokenizer {source} was trained. Name the run folder of one, or a published one."
        )
    return config


def tokenizer_of(run: Path, config: PretrainConfig) -> Path:
    """The tokenizer of a pre-training: what its config names, or, where runs have moved, the folder beside it."""
    there = config.tokenizer.exists() or is_remote(config.tokenizer)
    return config.tokenizer if there else run.parent / "tokenizer"


def paper_config(model: ModelConfig, config: TrainConfig | None = None) -> TrainConfig:
    """A training's config, by default the paper's, for a model of this shape; the share of masked patches stays."""
    config = config or CONFIG_CLASSES[type(model)]()
    known, patches = flatten(model), (model.encoder if isinstance(model, TokenizerModelConfig) else model.vit).grid
    before = (config.image_size // config.patch_size) ** 2
    known["num_masked"] = round(getattr(config, "num_masked", 0) / before * math.prod(patches))
    return dataclasses.replace(config, **{name: v for name, v in known.items() if hasattr(config, name)})


def _load(
    name: str | None, named: ModelConfig | None, loaded: Loaded, source: str, overrides: dict[str, Any]
) -> Tokenizer | Student | Classifier:
    weights = loaded.ours
    kind = kind_of(weights)
    wanted = kind if named is None else _kind(named)
    if kind != wanted != "classifier":  # only a classifier can start from another kind of model
        raise CheckpointError(
            f"these are the weights of a {kind}, but a {wanted} was asked for. Name a {kind}, or use other weights."
        )
    starts = named is not None and (kind != wanted or (kind == "classifier" and "head.weight" not in weights))
    if starts:
        assert isinstance(named, ClassifierConfig)
        backbone = own_positions(loaded.backbone(heads=named.vit.heads, eps=named.vit.eps))
        found: ModelConfig = ClassifierConfig(
            dataclasses.replace(backbone, drop_path=named.vit.drop_path), named.num_classes
        )
    else:
        found = loaded.config(**(flatten(named) if named is not None else overrides))
    if name is not None and named is not None:
        _check_name(name, named, found, source)
    config = _replace(found, overrides, source)
    _check_overrides(found, config, source)
    model: Tokenizer | Student | Classifier = MODEL_CLASSES[type(config)](config).eval()
    if starts or getattr(config, "num_classes", None) != getattr(found, "num_classes", None):
        _log.warning("%s: %s", source, describe_new(start_from(model, weights, source)))
    else:
        load_model(model, resize_positions(weights, model), source)
    return model


def _kind(config: ModelConfig) -> str:
    return str(MODEL_CLASSES[type(config)].__name__).lower()


def _replace(config: ModelConfig, overrides: dict[str, Any], where: str) -> ModelConfig:
    values = flatten(config)
    unknown = overrides.keys() - values.keys()
    if unknown:
        raise UserError(f"{where}: a {_kind(config)} has no {', '.join(sorted(unknown))}. It has {', '.join(values)}.")
    try:
        return unflatten(type(config), {**values, **overrides})
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error


def _check_name(name: str, named: ModelConfig, found: ModelConfig, source: str) -> None:
    wanted, there = flatten(named), flatten(found)
    wrong = [f"{key} {there[key]}, not {wanted[key]}" for key in DEFINING if wanted[key] != there[key]]
    if wrong:
        raise CheckpointError(
            f"{source} holds no {name}: it has {'; '.join(wrong)}. Name another model, or none to take what it is."
        )


def _check_overrides(found: ModelConfig, config: ModelConfig, source: str) -> None:
    """Options that the weights decide can be given, but not otherwise than the weights have them."""
    there, wanted = flatten(found), flatten(config)
    wrong = [f"{key} {there[key]}, not {wanted[key]}" for key in there if key not in FREE and there[key] != wanted[key]]
    if bool(there["layer_scale"]) != bool(wanted["layer_scale"]):
        wrong.append("layer scales" if there["layer_scale"] else "no layer scales")
    if wrong:
        raise CheckpointError(f"{source} has {'; '.join(wrong)}. Leave the option out, or use other weights.")
