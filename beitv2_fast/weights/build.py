"""Models from configs and from run folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..config.downstream import FinetuneConfig
from ..config.training import PretrainConfig, TokenizerConfig, TrainConfig
from ..errors import UserError
from ..models.classifier import Classifier, ClassifierConfig
from ..models.positions import resize_positions
from ..models.student import Student, StudentConfig
from ..models.tokenizer import Tokenizer, TokenizerModelConfig
from ..models.vit import ViTConfig
from ..runs.checkpoints import latest_weights, load_model, read_weights
from ..runs.folder import read_config, stored_config
from ..teachers import create_teacher
from ..teachers.base import Teacher
from ..teachers.classifier import teacher_name
from .shapes import describe


def same_options(config: TrainConfig, kind: type) -> dict[str, Any]:
    """The options of a training that a model's config has, too."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(kind) if hasattr(config, f.name)}


def vit_config(config: TrainConfig, **values: Any) -> ViTConfig:
    """The ViT of a training config; a shape that cannot be built is the user's error."""
    try:
        return ViTConfig(**{**same_options(config, ViTConfig), **values})
    except ValueError as error:
        raise UserError(f"{error}. Change one of these options.") from error


def trained_vit(config: TrainConfig, found: ViTConfig) -> ViTConfig:
    """A ViT of the shape that weights were found to have; what no weight depends on is as in the training's config."""
    free = ("image_size", "drop_path", "attention", "checkpointing", "init_std")
    return vit_config(config, **{name: v for name, v in dataclasses.asdict(found).items() if name not in free})


def build_tokenizer(config: TokenizerConfig, teacher_dim: int) -> Tokenizer:
    return Tokenizer(
        TokenizerModelConfig(
            encoder=vit_config(config, position="absolute"),
            teacher_dim=teacher_dim,
            **same_options(config, TokenizerModelConfig),
        )
    )


def build_student(config: PretrainConfig, num_codes: int) -> Student:
    try:
        return Student(StudentConfig(vit_config(config), num_codes, **same_options(config, StudentConfig)))
    except ValueError as error:
        raise UserError(f"{error}. Change one of these options.") from error


def load_run_model(
    run: Path, image_size: int | None = None, *, average: bool = False
) -> tuple[Tokenizer | Student | Classifier, TokenizerConfig | PretrainConfig | FinetuneConfig]:
    """The model of a training's run folder, from its newest checkpoint, in eval mode.

    Args:
        image_size: that of the images it will read, if not its training's; its positions are interpolated.
        average: of a fine-tuning, the moving average of the weights.
    """
    config = run_config(run)
    if image_size is not None:
        config = dataclasses.replace(config, image_size=image_size)
    path = latest_weights(run)
    if average:
        path = path.with_name("ema.safetensors")
    state = read_weights(path)
    if isinstance(config, TokenizerConfig):
        model: Tokenizer | Student | Classifier = build_tokenizer(config, state["decode_task_layer.2.weight"].shape[0])
    elif isinstance(config, PretrainConfig):
        model = build_student(config, state["lm_head.weight"].shape[0])
    elif teacher_name(config.weights) is not None:
        raise UserError(
            f"{run} is the fine-tuning of a teacher ({config.weights}), no model of this package: train/finetune.py "
            "--evaluate and train/evaluate.py read it, and nothing else does."
        )
    else:
        found = describe(state, {"heads": config.heads})
        assert isinstance(found, ClassifierConfig)
        model = Classifier(dataclasses.replace(found, vit=trained_vit(config, found.vit)))
    load_model(model, resize_positions(state, model), str(path))
    return model.eval(), config


def run_config(run: Path) -> TokenizerConfig | PretrainConfig | FinetuneConfig:
    """The config of a run folder whose model ``load_run_model`` loads."""
    configs: dict[str, type[TokenizerConfig | PretrainConfig | FinetuneConfig]]
    configs = {config.stage: config for config in (TokenizerConfig, PretrainConfig, FinetuneConfig)}
    stage = str(stored_config(run)["stage"])
    if stage not in configs:
        raise UserError(f"{run} is a run folder of {stage}, but one of {', '.join(configs)} is needed.")
    return read_config(configs[stage], run)


def load_teacher(config: TokenizerConfig, tokenizer: Tokenizer) -> Teacher:
    """The teacher that a run's tokenizer was trained on.

    Raises:
        UserError: its weights are not available, or its features have another width: it was another one.
    """
    teacher = create_teacher(config.teacher, tokenizer.grid, config.teacher_weights, resize=config.teacher_resize)
    if teacher.dim != tokenizer.config.teacher_dim:
        raise UserError(
            f"the teacher {config.teacher} has features of width {teacher.dim}, the tokenizer was trained on "
            f"{tokenizer.config.teacher_dim}: it was another one"
        )
    return teacher
