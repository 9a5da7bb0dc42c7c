"""Probes of a frozen backbone: `python train/linear_probe.py --run RUN --data FOLDER --out RUN`.

A sweep of linear classifiers over layers and learning rates, as published; k nearest neighbours; few images a class.
With --exact also the probe to convergence, on what a representation has to beat too: the untrained backbone and raw
pixels, and on the teacher's features, from which the tokenizer learnt.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from beitv2_fast.build import build_student, load_run_model
from beitv2_fast.checkpoint import latest_weights
from beitv2_fast.config import PretrainConfig, ProbeConfig, TokenizerConfig, parse
from beitv2_fast.data import ImageList, check_images, find_images
from beitv2_fast.distributed import run_main, start
from beitv2_fast.errors import UserError
from beitv2_fast.neighbours import knn_predict
from beitv2_fast.presets import PROBE
from beitv2_fast.probe import ProbeResult, balanced_accuracy, few_shot, linear_probe
from beitv2_fast.probe_features import KINDS, Extractor, Features, feature_names, student_features
from beitv2_fast.run import RunFolder, read_config, write_atomically
from beitv2_fast.student import Student
from beitv2_fast.sweep import sweep
from beitv2_fast.teachers import create_teacher

PIXELS = 32  # side of the images whose raw pixels are probed
Split = dict[str, ImageList]


def find_labelled(config: ProbeConfig, run: RunFolder, min_size: int) -> Split:
    test = "test" if (config.data / "test").is_dir() else "val"
    splits = {}
    for split, folder in (("train", "train"), ("test", test)):
        if not (config.data / folder).is_dir():
            raise UserError(f"{config.data} needs the folders train/CLASS and test/CLASS (or val/CLASS) for a probe")
        splits[split] = check_images(
            find_images(config.data, folder),
            cache=run.path / f"images_{split}.json",
            min_size=min_size,
            workers=config.workers,
        )
    if splits["train"].labels is None or len(splits["train"].classes) < 2:
        raise UserError(f"{config.data}/train needs at least two class folders for a probe")
    for images in splits.values():
        empty = [name for i, name in enumerate(images.classes) if i not in images.labels]
        if empty:
            raise UserError(
                f"no image of the classes {', '.join(empty)} in {images.root} can be used; add some ({split})"
            )
    if splits["train"].classes != splits["test"].classes:
        raise UserError(
            f"train has the classes {splits['train'].classes}, {test} has {splits['test'].classes}: "
            "they must be the same"
        )
    return splits


def rows(
    config: ProbeConfig, pretrain: PretrainConfig, extract: Extractor, model: Student, trained: Features
) -> Iterator[tuple[str, Callable[[int], Features]]]:
    """(name, seed -> features by split) of every row of the table."""

    @functools.cache
    def untrained(seed: int) -> Features:
        torch.manual_seed(1000 + seed)
        fresh = build_student(pretrain, model.config.num_codes).to(extract.device).eval()
        return extract("untrained", pretrain.image_size, student_features(fresh))

    networks = {"pre-trained": lambda seed: trained}
    if config.exact:
        networks["untrained"] = untrained
    for name, features in networks.items():
        for column, (kind, title) in enumerate(KINDS.items()):
            if config.features in ("auto", kind):
                yield (
                    f"{name}, {title}",
                    lambda seed, f=features, c=column: {split: x[:, c] for split, x in f(seed).items()},
                )
    if not config.exact:
        return
    found = extract("pixels", PIXELS, lambda images: images.flatten(1))
    yield f"pixels, {PIXELS}x{PIXELS}", lambda seed, found=found: found
    if config.tokenizer is not None:
        stored = read_config(TokenizerConfig, config.tokenizer)
        grid = (stored.image_size // stored.patch_size,) * 2
        teacher = create_teacher(stored.teacher, grid, stored.teacher_weights).to(extract.device)
        view = stored.teacher_image_size or stored.image_size
        found = extract("teacher", view, lambda images: teacher(images, grid).mean(1))
        yield f"teacher ({stored.teacher}), mean of patches", lambda seed, found=found: found


def probe_row(
    name: str, features: Callable[[int], Features], labels: Features, config: ProbeConfig, device: torch.device
) -> dict[str, Any]:
    """A row of results.json: balanced accuracies of the k nearest neighbours, few-shot probes and the exact probe."""
    seeds = range(config.seed, config.seed + config.seeds)
    first, num_classes = features(config.seed), int(labels["train"].max()) + 1
    predicted = knn_predict(
        first["train"], labels["train"].to(device), first["test"].to(device), num_classes, config.neighbours
    )
    knn = {str(k): balanced_accuracy(p.cpu(), labels["test"], num_classes) for k, p in predicted.items()}
    few = {}
    for shots in config.shots:
        given = (first["train"], labels["train"], first["test"], labels["test"])
        result = ProbeResult(name, few_shot(*given, shots, seeds))
        few[str(shots)] = {"mean": result.mean, "std": result.std, "runs": result.runs}
    row = {"features": name, "knn": knn, "few_shot": few}
    if config.exact:

        def both(seed: int) -> tuple[Tensor, Tensor]:
            found = features(seed)
            return found["train"], found["test"]

        result = linear_probe(name, both, labels["train"], labels["test"], seeds)
        row |= {"mean": result.mean, "std": result.std, "runs": result.runs}
    return row


def line(row: dict[str, Any]) -> str:
    exact = f"  linear {row['mean']:.3f} ± {row['std']:.3f}" if "mean" in row else ""
    near = "  ".join(f"{k}-NN {value:.3f}" for k, value in row["knn"].items())
    few = "  ".join(f"{n}-shot {found['mean']:.3f} ± {found['std']:.3f}" for n, found in row["few_shot"].items())
    return f"probe  {row['features']:<42}{exact}  {near}  {few}"


def swept(config: ProbeConfig, trained: Features, labels: Features, run: RunFolder, device: torch.device) -> list:
    """The published probe, of several layers and learning rates at once: top-1 and top-5."""
    names = feature_names(config.layers)
    keep = [i for i in range(len(names)) if i > 1 or config.features in ("auto", list(KINDS)[i])]
    train, test = ((trained[split][:, keep], labels[split]) for split in ("train", "test"))
    how = {"learning_rates": config.learning_rates, "epochs": config.epochs, "batch_size": config.sgd_batch_size}
    found = sweep([names[i] for i in keep], train, test, **how, seed=config.seed, device=device)
    for result in found:
        run.print(
            f"sweep  {result.features:<42}  top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  "
            f"lr {result.lr:g} (held out: {result.held_out:.2%})"
        )
    return found


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(ProbeConfig, PROBE, argv)
    world = start(config.device)
    model, pretrain = load_run_model(config.run)
    if not isinstance(model, Student):
        raise UserError(f"--run {config.run} is the run folder of a tokenizer; the probe needs a pre-training's")
    if any(layer > pretrain.depth for layer in config.layers):
        raise UserError(f"--layers {' '.join(map(str, config.layers))}: the network has {pretrain.depth} blocks")
    model.to(world.device)
    if config.tokenizer is not None:
        read_config(TokenizerConfig, config.tokenizer)  # now, not after the other features have been computed
    run = RunFolder(config, world.rank)
    splits = find_labelled(config, run, pretrain.patch_size)
    labels = {split: torch.tensor(images.labels) for split, images in splits.items()}
    extract = Extractor(splits, run.path / "features", world, batch_size=config.batch_size, workers=config.workers)
    key = f"{latest_weights(config.run).resolve()}/{config.layers}"
    trained = extract("pre-trained", pretrain.image_size, student_features(model, config.layers), key)
    sweeps = swept(config, trained, labels, run, world.device)
    table = []
    for name, features in rows(config, pretrain, extract, model, trained):
        table.append(probe_row(name, features, labels, config, world.device))
        run.print(line(table[-1]))
    classes = splits["train"].classes
    metric = "balanced accuracy"
    if not config.exact:  # the published probe's number stands for the row
        metric, top1 = "top-1 accuracy", {f"pre-trained, {r.features}": r.top1 for r in sweeps}
        table = [{**row, "mean": top1[row["features"]], "std": 0.0, "runs": [top1[row["features"]]]} for row in table]
    content = {
        "task": f"which of {len(classes)} classes: {', '.join(classes[:10])}",
        "metric": metric,
        "chance": 1 / len(classes),
        "seeds": config.seeds,
        "images": {split: len(images) for split, images in splits.items()},
        "rows": table,
        "sweep": [dataclasses.asdict(result) for result in sweeps],
        "notes": ["The teacher was trained with ImageNet's labels; nothing else here saw a label."],
    }
    if run.writes:
        write_atomically(run.path / "results.json", json.dumps(content, indent=2) + "\n")
    run.print(f"probe: done; {run.path / 'results.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
