"""Top-1 and top-5 of a fine-tuned classifier: ``python train/evaluate.py --model RUN --data FOLDER [FOLDER ...]``.

A folder with only some of the classes (ImageNet-A, ImageNet-R) is evaluated among these. Also under ``torchrun`` and
``deepspeed``, whose ranks share the images. Stopped and started again, it goes on with the next folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from beitv2_fast.config.downstream import EvaluateConfig
from beitv2_fast.config.options import parse
from beitv2_fast.config.presets import EVALUATE
from beitv2_fast.data.find import find_images
from beitv2_fast.data.views import EvalView
from beitv2_fast.distributed import autocast_dtype, run_main, start
from beitv2_fast.downstream.classification import (
    crop_share,
    labeled_images,
    load_classifier,
    stored_classes,
    top1_line,
)
from beitv2_fast.downstream.evaluation import columns_of, evaluate_classifier, listed_classes
from beitv2_fast.errors import UserError
from beitv2_fast.models.classifier import Classifier
from beitv2_fast.runs.checkpoints import latest_weights
from beitv2_fast.runs.folder import RunFolder, is_run_folder
from beitv2_fast.runs.sources import locate
from beitv2_fast.teachers.classifier import TeacherClassifier
from beitv2_fast.training.images import found_images


def models(config: EvaluateConfig) -> dict[str, Classifier | TeacherClassifier]:
    """The classifier by name: of a fine-tuning that kept an average of its weights, both."""
    model, stored = load_classifier(config.model, config.image_size)
    found: dict[str, Any] = {"weights": model}
    if is_run_folder(config.model) and getattr(stored, "ema_decay", None):
        found["average"] = load_classifier(config.model, config.image_size, average=True)[0]
    if not isinstance(found["weights"], Classifier | TeacherClassifier):
        raise UserError(f"--model {config.model} is no classifier. Fine-tune it first: train/finetune.py --weights.")
    return found


def class_names(config: EvaluateConfig, model: Classifier | TeacherClassifier) -> list[str]:
    """The names of the classifier's classes."""
    source, names = config.classes, None
    if source is None:
        names = stored_classes(locate(config.model))
    elif source.is_dir():
        names = find_images(source, "train", labeled=True).classes
    elif source.is_file():
        names = listed_classes(source)
    else:
        raise UserError(f"--classes {source} does not exist. Name a folder of class folders, or a text file.")
    if names is None:
        raise UserError(
            f"nothing says which classes {config.model} knows. Give --classes: the training's folder of class folders, "
            "or a text file with one name per line."
        )
    if len(names) != model.head.out_features:
        raise UserError(
            f"{source or config.model} names {len(names)} classes, the classifier has {model.head.out_features}. "
            "Give the --classes that it was trained for."
        )
    return names


def folder_names(folders: tuple[Path, ...]) -> list[str]:
    """Short names, the whole path where two folders have the same."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def source_state(model: Path) -> str:
    """Tells the weights from later ones under the same name."""
    file = latest_weights(model).resolve() if is_run_folder(model) else locate(model)
    return f"{file} {file.stat().st_mtime_ns}"


def finished_rows(run: RunFolder, state: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What an interrupted evaluation of the same weights has already found, by folder and model."""
    try:
        content = json.loads((run.path / "results.json").read_text())
        return {(row["folder"], row["model"]): row for row in content["rows"]} if content["state"] == state else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(EvaluateConfig, EVALUATE, argv)
    world = start(config.device)
    found = {name: model.to(world.device) for name, model in models(config).items()}
    first = found["weights"]
    classes = class_names(config, first)
    run = RunFolder(config, world.rank)
    state = source_state(config.model)
    finished = finished_rows(run, state)
    shape: Any = getattr(first, "vit_config", first)
    size = shape.image_size
    view = EvalView(size, crop_share(config.crop_pct, size))
    for i, folder in enumerate(config.data):  # what is missing is told before all images of the others are checked
        columns_of(found_images(folder, None, run, world, name=f"_{i}", labeled=True), classes, folder)
    datasets = {}
    for i, (name, folder) in enumerate(zip(folder_names(config.data), config.data, strict=True)):
        images = labeled_images(folder, None, str(i), config, run, world, view=view, min_size=shape.patch_size)
        datasets[name] = images, columns_of(images.images, classes, folder)
    rows = []
    for name, (dataset, columns) in datasets.items():
        for kind, model in found.items():
            row = {"folder": name, "model": kind, "classes": len(columns), "images_found": dataset.images.fingerprint}
            if row.items() <= finished.get((name, kind), {}).items():
                rows.append(finished[name, kind])
                continue
            result = evaluate_classifier(
                model,
                dataset,
                columns,
                world,
                batch_size=config.batch_size,
                workers=config.workers,
                amp=autocast_dtype(config.precision, world.device),
            )
            rows.append({**row, **result})
            among = f"{len(columns)} of {len(classes)} classes"
            run.print(f"evaluate  {name:<20} {kind:<8} {top1_line(result, len(columns))}, {among}")
            run.results({"model": str(config.model), "state": state, "rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
