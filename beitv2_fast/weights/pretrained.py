"""A trained model as a folder that ``hf-hub:`` can serve: config.json, model.safetensors, README.md (its card)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config.options import RunConfig, fingerprint, to_json
from ..config.presets import FINETUNE, PRETRAIN, TOKENIZER
from ..config.training import TrainConfig
from ..errors import UserError
from ..models.classifier import Classifier, ClassifierConfig
from ..models.student import Student, StudentConfig
from ..models.tokenizer import Tokenizer, TokenizerModelConfig
from ..runs.checkpoints import latest_weights, save_weights
from ..runs.files import atomically
from ..runs.folder import CONFIG, is_run_folder, stored_config
from ..runs.logs import read_metrics
from ..runs.sources import locate
from .create import create_model, training_config
from .files import METADATA, read
from .shapes import ModelConfig, flatten

CARD, CLASSES = "README.md", "classes.json"
PRESETS: dict[str, Mapping[str, RunConfig]] = {"tokenizer": TOKENIZER, "pretrain": PRETRAIN, "finetune": FINETUNE}
KINDS = {TokenizerModelConfig: "tokenizer", StudentConfig: "student", ClassifierConfig: "classifier"}
USE = {
    "tokenizer": "codes = model.encode(images)  # [B, N]",
    "student": "cls, patches = beitv2_fast.features(model, images)",
    "classifier": "top = beitv2_fast.classify(model, images).topk(5)",
}


def save_pretrained(source: nn.Module | str | Path, folder: str | Path, *, force: bool = False) -> Path:
    """Write a model with its card into a folder, which ``create_model(checkpoint=folder)`` and every command read.

    Of a run folder the card tells the training: its options beside those of the nearest preset, the name of its data
    folder (no path of this machine), and the last numbers of its log and evaluation.

    Args:
        source: a model, or whatever ``create_model`` reads.
        folder: to write.
        force: replace it, if it is such a folder.

    Raises:
        UserError: the folder exists, or is none of a model.
    """
    if isinstance(source, nn.Module):
        config: Any = source.config
        return write_pretrained(folder, source.state_dict(), config, force=force)
    loaded = read(source)
    return write_pretrained(folder, loaded.ours, loaded.config(), source, force=force)


def from_pretrained(source: str | Path, **overrides: Any) -> Tokenizer | Student | Classifier:
    """``create_model(checkpoint=source)``: of a folder, ``hf-hub:ORGANIZATION/NAME``, a published name, ..."""
    return create_model(checkpoint=source, **overrides)


def write_pretrained(
    folder: str | Path, ours: Mapping[str, Tensor], config: ModelConfig, source: str | Path | None = None, *,
    force: bool = False,
) -> Path:  # fmt: skip
    """``save_pretrained`` of a state dict under our names; ``source``: where it was read, if anywhere."""
    folder, kind = Path(folder), KINDS[type(config)]
    if folder.exists() and not (force and _holds_model(folder)):
        advice = ", or give --force (force=True) to replace it" if _holds_model(folder) else ""
        raise UserError(f"{folder} exists. Name another folder{advice}.")
    run = None if source is None else locate(source)
    training = None if source is None else training_config(source)
    values: dict[str, Any] = {"model_type": METADATA, "model": kind, "config": flatten(config)}
    if training is not None:
        training = without_paths(training)
        values["training"] = to_json(training)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_weights(ours, temporary / "model.safetensors", {METADATA: json.dumps(flatten(config)), "format": "pt"})
        if run is not None and (run / CLASSES).is_file():
            shutil.copyfile(run / CLASSES, temporary / CLASSES)
        (temporary / CARD).write_text(model_card(kind, config, training, run), encoding="utf-8")

    folder.parent.mkdir(parents=True, exist_ok=True)
    atomically(folder, write)
    return folder


def model_card(kind: str, config: ModelConfig, training: TrainConfig | None, run: Path | None) -> str:
    """README.md in Markdown, with the metadata that hubs read in front."""
    task = "image-classification" if kind == "classifier" else "image-feature-extraction"
    lines = ["---", f"library_name: {METADATA.replace('_', '-')}", f"pipeline_tag: {task}", "tags:"]
    lines += ["- beitv2", f"- {kind}", "---", "", f"# BEiT v2: a {kind}", ""]
    lines += ["```python", "import beitv2_fast", "", 'model = beitv2_fast.from_pretrained("hf-hub:ORGANIZATION/NAME")']
    image_size = flatten(config)["image_size"]
    lines += [f'images = beitv2_fast.read_images(["photo.jpg"], size={image_size})', USE[kind], "```", ""]
    lines += ["## Config", "", *_table(flatten(config))]
    if training is not None:
        preset, others = nearest_preset(training)
        lines += ["", "## Training", "", f"Stage `{training.stage}`, preset `{preset}`"]
        lines[-1] += ", but for:" if others else "."
        lines += ["", *_table(others)] if others else []
        lines += ["", "## Data", "", f"Images of a folder named `{training.data.name}`."]
    metrics = last_metrics(run) if run is not None else {}
    if metrics:
        lines += ["", "## Metrics", "", *_table(metrics)]
    return "\n".join(lines) + "\n"


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The preset with most options alike, and the options that are not; paths aside."""
    mine = _choices(config)
    presets = {name: _choices(preset) for name, preset in PRESETS[config.stage].items()}
    others = {name: {k: v for k, v in mine.items() if values[k] != v} for name, values in presets.items()}
    nearest = min(others, key=lambda name: len(others[name]))
    return nearest, others[nearest]


def last_metrics(run: Path) -> dict[str, Any]:
    """The last line of a run's log and of its evaluation, up to the checkpoint that is saved."""
    if not is_run_folder(run):
        return {}
    step = int(latest_weights(run).parent.name.removeprefix("step_"))
    found: dict[str, Any] = {"step": step}
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        lines = [line for line in read_metrics(run, name) if line["step"] <= step]
        found |= {key: value for key, value in (lines[-1] if lines else {}).items() if key != "step"}
    return found


def _choices(config: RunConfig) -> dict[str, Any]:
    paths = [f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), Path)]
    return {name: v for name, v in fingerprint(config).items() if name not in (*paths, "data", "seed")}


def without_paths(config: Any) -> Any:
    """Only the last parts of paths that begin at the root of this machine's disk, which tell others nothing."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    kinds = {name: type(value) for name, value in values.items() if isinstance(value, str | Path)}
    found = {n: kinds[n](Path(values[n]).name) for n in kinds if Path(values[n]).is_absolute()}
    return dataclasses.replace(config, **found)


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and stored_config(folder).get("model_type") == METADATA


def _table(values: dict[str, Any]) -> list[str]:
    def shown(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    return ["| | |", "|---|---|", *(f"| {name} | {shown(value)} |" for name, value in values.items())]
