"""The frozen networks that can be probed: of a run, of its shape with random weights, or a tokenizer's teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.downstream import ProbeConfig
from ...config.training import PretrainConfig, TokenizerConfig, TrainConfig
from ...errors import UserError
from ...models.classifier import Classifier
from ...models.student import Student
from ...models.tokenizer import Tokenizer
from ...models.vit import ViTConfig
from ...runs.checkpoints import latest_weights
from ...runs.folder import content, is_run_folder
from ...runs.sources import is_remote
from ...teachers import TAUGHT_BY, create_teacher, native_teacher
from ...teachers.base import Teacher
from ...teachers.classifier import TEACHER
from ...weights.create import tokenizer_config, tokenizer_of
from .features import ATTENDED, POOLED, read_features

TITLES = {Student: "pre-trained", Tokenizer: "VQ-KD encoder", Classifier: "fine-tuned"}
Model = Student | Classifier | Tokenizer
Run = tuple[Model, object]  # what ``open_model`` gives


@dataclass(frozen=True)
class Backbone:
    """features: images [B, 3, image_size, image_size] in [0, 1] -> [B, columns, C], or for the attentive protocol
    patches [B, N, C]. key: see ``Extractor``."""

    title: str
    image_size: int
    columns: list[str]
    features: Callable[[Tensor], Tensor]
    key: str = ""


def completed(config: ProbeConfig, stored: TrainConfig | None) -> ProbeConfig:
    """With the images and the tokenizer of the run's training, where no others are named.

    Raises:
        UserError: nothing says which images these were.
    """
    data, tokenizer = config.data, config.tokenizer
    if data is None and stored is not None and is_run_folder(config.run):
        data = stored.data
    if data is None:
        raise UserError(f"nothing says which images {config.run} was trained on. Name a folder of images with --data.")
    if tokenizer is None and isinstance(stored, TokenizerConfig):
        tokenizer = config.run
    elif tokenizer is None and isinstance(stored, PretrainConfig):
        found = tokenizer_of(config.run, stored)
        tokenizer = found if found.exists() or is_remote(found) else None  # nobody has named it
    return replace(config, data=data, tokenizer=tokenizer)


def choose_backbone(config: ProbeConfig, run: Run | None, device: torch.device) -> Backbone:
    """The one that --backbone names. ``run``: the model of --run and its config; None: it is a teacher."""
    if run is None and config.backbone == "untrained":
        raise UserError("--backbone untrained takes the shape of a run's network, and no teacher's. Leave it out.")
    if run is None or config.backbone == "teacher":
        if config.layers or config.protocol in ("blocks", "concatenated"):
            raise UserError(
                "a teacher is probed as a whole, by the patches that it gives: --layers and the protocols blocks and "
                "concatenated are for the network of --run. Leave them out."
            )
        if run is None:
            return named_teacher(config, device)
        if config.tokenizer is None:
            raise UserError(
                f"--backbone teacher: {config.run} is no tokenizer's run folder. Give the one whose teacher you mean "
                "with --tokenizer."
            )
        return teacher(config.tokenizer, device, config.protocol)
    model, _ = run
    if config.layers and config.protocol == "attentive":
        raise UserError("--protocol attentive reads the last patches; --layers are for the others. Leave it out.")
    depth = vit_of(model).depth
    if any(layer > depth for layer in config.layers):
        raise UserError(f"--layers {' '.join(map(str, config.layers))}: the network has {depth} blocks")
    if config.backbone == "untrained":
        return untrained(config, run, config.seed, device)
    key = f"{weights_state(config.run)}/{config.layers}"
    columns, features = read_features(model.to(device), config.protocol, config.layers)
    return Backbone(TITLES[type(model)], vit_of(model).image_size, columns, features, key)


def untrained(config: ProbeConfig, run: Run, seed: int, device: torch.device) -> Backbone:
    """A network of the shape of --run with the random weights of its training's start, other ones for each seed."""
    model, _ = run
    torch.manual_seed(1000 + seed)
    kind: Any = type(model)
    fresh = kind(model.config).to(device).eval()
    columns, features = read_features(fresh, config.protocol, config.layers)
    return Backbone("untrained", vit_of(model).image_size, columns, features)


def teacher(tokenizer: Path, device: torch.device, protocol: str = "sweep") -> Backbone:
    """The patch features from which a tokenizer learned: their mean, or for the attentive protocol all of them."""
    stored = tokenizer_config(tokenizer)
    grid = (stored.image_size // stored.patch_size,) * 2
    network = create_teacher(stored.teacher, grid, stored.teacher_weights, resize=stored.teacher_resize).to(device)
    key = f"{stored.teacher}/{stored.teacher_weights}/{grid}"
    return _of_patches(network, grid, stored.teacher, stored.teacher_image_size or stored.image_size, key, protocol)


def named_teacher(config: ProbeConfig, device: torch.device) -> Backbone:
    """The teacher:NAME of --run at its own image size."""
    name = str(config.run).removeprefix(TEACHER)
    network, grid = native_teacher(name, config.teacher_weights)
    key = f"{name}/{config.teacher_weights}/{grid}"
    return _of_patches(network.to(device), grid, name, network.input_size, key, config.protocol)


def _of_patches(
    network: Teacher, grid: tuple[int, int], name: str, image_size: int, key: str, protocol: str
) -> Backbone:
    attentive = protocol == "attentive"
    columns = [ATTENDED if attentive else POOLED["mean"]]

    def features(images: Tensor) -> Tensor:
        patches = network(images, grid)
        return patches if attentive else patches.mean(1)[:, None]

    return Backbone(f"teacher ({name})", image_size, columns, features, key)


def weights_state(source: Path) -> str:
    """Tells the weights of a model from later ones under the same name."""
    return str(latest_weights(source).resolve()) if is_run_folder(source) else f"{source} {content(source)}"


def vit_of(model: Model) -> ViTConfig:
    """The config of a model's ViT, of a tokenizer its encoder's."""
    return model.config.encoder if isinstance(model, Tokenizer) else model.vit_config


def labels_seen(config: ProbeConfig, run: Run | None) -> str:
    """A remark for the report: whether labels were used in the trainings behind the numbers."""
    if run is None:
        return _taught(str(config.run).removeprefix(TEACHER))
    if isinstance(run[0], Classifier) and config.backbone == "trained":
        return "The backbone was fine-tuned with labels."
    try:
        name = tokenizer_config(config.tokenizer).teacher if config.tokenizer else ""
    except UserError:
        name = ""
    if not name:
        return "The trainings here saw no label; what the tokenizer's teacher learned from is not known here."
    return _taught(name)


def _taught(name: str) -> str:
    learned = TAUGHT_BY.get(name.partition("@")[0], "what its source says")
    return f"The teacher ({name}) learned from {learned}; nothing else here saw a label."
