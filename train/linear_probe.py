"""Probes of a frozen backbone: ``deepspeed train/linear_probe.py --run RUN --data FOLDER --out RUN``.

A sweep of linear classifiers over layers and learning rates; k nearest neighbors; few images per class. Or, with
--protocol, classifiers by AdamW on random crops, as BEiT, DINOv2 and CAPI probe: see ``downstream.probes.trained``.

With --exact also the probe to convergence, on what a representation has to beat too: the untrained backbone and raw
pixels, and on the teacher's features, from which the tokenizer learned.

Also under ``torchrun`` and plain ``python``. The ranks share the images of which the features are computed; only
rank 0 then fits the sweep's classifiers, and the others end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from beitv2_fast.config.downstream import ProbeConfig
from beitv2_fast.config.options import parse
from beitv2_fast.config.presets import PROBE
from beitv2_fast.data.images import ImageList
from beitv2_fast.distributed import World, run_main, start
from beitv2_fast.downstream.probes.backbones import (
    Backbone,
    Run,
    choose_backbone,
    completed,
    labels_seen,
    teacher,
    untrained,
    vit_of,
)
from beitv2_fast.downstream.probes.exact import ProbeResult, balanced_accuracy, few_shot, linear_probe
from beitv2_fast.downstream.probes.features import POOLED, Extractor, SplitFeatures
from beitv2_fast.downstream.probes.images import find_labeled
from beitv2_fast.downstream.probes.knn import knn_predict
from beitv2_fast.downstream.probes.sweep import Classifiers, SweepResult, fit_sweep, shares
from beitv2_fast.downstream.probes.trained import evaluate_probe, train_probe
from beitv2_fast.errors import UserError
from beitv2_fast.runs.checkpoints import latest_weights, read_weights, save_weights
from beitv2_fast.runs.files import atomically
from beitv2_fast.runs.folder import RunFolder
from beitv2_fast.teachers.classifier import teacher_name
from beitv2_fast.weights.create import open_model, tokenizer_config

CLASSIFIERS = "classifiers.safetensors"  # of the sweep: one for each feature, in the order of results.json
PIXELS = 32  # side of the images whose raw pixels are probed
Probed = tuple[str, list[SplitFeatures]]  # name, features [N, C] by split: one for all seeds, or one per seed


def kept_columns(config: ProbeConfig, backbone: Backbone) -> list[int]:
    """Those of the features that --features names, and those of single blocks."""
    dropped = [title for kind, title in POOLED.items() if config.features not in ("auto", kind)]
    keep = [i for i, title in enumerate(backbone.columns) if title not in dropped]
    if not keep:
        raise UserError(f"--features {config.features}: a teacher has only the {backbone.columns[0]}. Leave it out.")
    return keep


def extracted(extract: Extractor, backbone: Backbone) -> SplitFeatures:
    return extract(backbone.title, backbone.image_size, backbone.features, backbone.key)


def rows_of(title: str, columns: Sequence[str], keep: Sequence[int], by_seed: list[SplitFeatures]) -> Iterator[Probed]:
    """The rows of a backbone: those of the whole network."""
    for i in keep:
        if columns[i] in POOLED.values():
            yield f"{title}, {columns[i]}", [{split: x[:, i] for split, x in found.items()} for found in by_seed]


def compared(config: ProbeConfig, run: Run, extract: Extractor) -> Iterator[Probed]:
    """What --exact compares a trained network with."""
    whole = dataclasses.replace(config, layers=())
    seeds = range(config.seed, config.seed + config.seeds)
    fresh = [untrained(whole, run, seed, extract.device) for seed in seeds]
    found = [extracted(extract, network) for network in fresh]
    yield from rows_of(fresh[0].title, fresh[0].columns, kept_columns(whole, fresh[0]), found)
    pixels = extract("pixels", PIXELS, lambda images: images.flatten(2))
    gray = all(x.eq(x[:, :1]).all() for x in pixels.values())  # one channel then tells what three do in a third of time
    yield f"pixels, {PIXELS}x{PIXELS}", [{split: x[:, : 1 if gray else 3].flatten(1) for split, x in pixels.items()}]
    if config.tokenizer is not None:
        known = teacher(config.tokenizer, extract.device)
        yield from rows_of(known.title, known.columns, [0], [extracted(extract, known)])


def probe_row(row: Probed, labels: SplitFeatures, config: ProbeConfig, device: torch.device) -> dict[str, Any]:
    """A row of results.json: balanced accuracies of the k nearest neighbors, few-shot probes and the exact probe."""
    name, by_seed = row
    seeds = range(config.seed, config.seed + config.seeds)
    first, num_classes = by_seed[0], int(labels["train"].max()) + 1
    near = [
        knn_predict(x["train"], labels["train"].to(device), x["test"].to(device), num_classes, config.neighbors)
        for x in by_seed
    ]
    knn = {
        str(k): ProbeResult([balanced_accuracy(p[k].cpu(), labels["test"], num_classes) for p in near])
        for k in config.neighbors
    }
    few = {}
    for shots in config.shots:
        result = few_shot(first["train"], labels["train"], first["test"], labels["test"], shots, seeds)
        few[str(shots)] = {"mean": result.mean, "std": result.std, "runs": result.runs}
    found: dict[str, Any] = {
        "features": name,
        "knn": {k: result.mean for k, result in knn.items()},
        "knn_std": {k: result.std for k, result in knn.items()},
        "error": max(result.error for result in knn.values()),
        "few_shot": few,
    }
    if config.exact:

        def both(seed: int) -> tuple[Tensor, Tensor]:
            features = by_seed[(seed - config.seed) % len(by_seed)]
            return features["train"], features["test"]

        result = linear_probe(both, labels["train"], labels["test"], seeds)
        found |= {"mean": result.mean, "std": result.std, "runs": result.runs}
        found["error"] = max(found["error"], result.error)
    return found


def line(row: dict[str, Any]) -> str:
    exact = f"  linear {row['mean']:.3f} ± {row['std']:.3f}" if "mean" in row else ""
    near = "  ".join(f"{k}-NN {value:.3f}" for k, value in row["knn"].items())
    few = "  ".join(f"{n}-shot {found['mean']:.3f} ± {found['std']:.3f}" for n, found in row["few_shot"].items())
    return f"probe  {row['features']:<42}{exact}  {near}  {few}"


def swept(
    config: ProbeConfig,
    names: list[str],
    train: Tensor,
    test: Tensor,
    labels: SplitFeatures,
    run: RunFolder,
    world: World,
) -> list[SweepResult]:
    """Several features and learning rates at once: top-1 and top-5. The classifiers are kept in the run folder."""
    how: dict[str, Any]
    how = {"learning_rates": config.learning_rates, "epochs": config.epochs, "batch_size": config.sgd_batch_size}
    given = (train, labels["train"]), (test, labels["test"])
    found, classifiers = fit_sweep(names, *given, **how, seed=config.seed, device=world.device)
    atomically(run.path / CLASSIFIERS, lambda temporary: save_weights(vars(classifiers), temporary))
    for result in found:
        top5 = "" if result.top5 is None else f"  top-5 {result.top5:.2%}"
        run.print(
            f"sweep  {result.features:<42}  top-1 {result.top1:.2%}{top5}  "
            f"lr {result.lr:g} (held out: {result.held_out:.2%})"
        )
    return found


def need_classifiers(config: ProbeConfig, run: RunFolder) -> None:
    """UserError if the run folder has nothing that --evaluate could evaluate."""
    if config.protocol != "sweep":
        latest_weights(run.path)
    elif not (run.path / CLASSIFIERS).is_file():
        raise UserError(f"--evaluate: {run.path} has no {CLASSIFIERS}. Run the probe without it first.")


def evaluate(
    config: ProbeConfig, run: RunFolder, backbone: Backbone, keep: list[int], splits: dict[str, ImageList], world: World
) -> int:
    """--evaluate: the classifiers that a sweep left, on the test images."""
    test = {"test": splits["test"]}
    extract = Extractor(test, run.path / "features", world, batch_size=config.batch_size, workers=config.workers)
    found = extracted(extract, backbone)
    if world.rank:
        return 0
    state = read_weights(run.path / CLASSIFIERS)
    classifiers = Classifiers(**{name: value.to(world.device) for name, value in state.items()})
    top1, top5 = shares(classifiers, found["test"][:, keep], torch.tensor(splits["test"].labels))
    for i, column in enumerate(keep):
        run.print(f"evaluation  {backbone.columns[column]:<42}  top-1 {top1[i, 0]:.2%}  top-5 {top5[i, 0]:.2%}")
    values = {backbone.columns[column]: top1[i, 0].item() for i, column in enumerate(keep)}
    run.metrics(0, values, "evaluation.jsonl")
    return 0


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(ProbeConfig, PROBE, argv)
    world = start(config.device)
    trained = open_model(config.run) if teacher_name(config.run) is None else None
    config = completed(config, None if trained is None else trained[1])
    assert config.data is not None
    backbone = choose_backbone(config, trained, world.device)
    keep = kept_columns(config, backbone) if config.protocol == "sweep" else []
    if config.exact and config.tokenizer is not None:
        tokenizer_config(config.tokenizer)  # now, not after the other features have been computed
    run = RunFolder(config, world.rank)
    if config.evaluate:  # what is missing is told before all images are checked
        need_classifiers(config, run)
    splits = find_labeled(config.data, config, run, world, 1 if trained is None else vit_of(trained[0]).patch_size)
    if config.protocol != "sweep":
        go = evaluate_probe if config.evaluate else train_probe
        return go(config, backbone, splits, run, world, labels_seen(config, trained))
    extract = Extractor(splits, run.path / "features", world, batch_size=config.batch_size, workers=config.workers)
    if config.evaluate:
        return evaluate(config, run, backbone, keep, splits, world)
    found = extracted(extract, backbone)
    others: list[Probed] = []
    if trained is not None and config.exact and config.backbone == "trained":
        others = list(compared(config, trained, extract))
    world.leave()
    if world.rank:
        return 0

    labels = {split: torch.tensor(images.labels) for split, images in splits.items()}
    names = [backbone.columns[i] for i in keep]
    sweeps = swept(config, names, found["train"][:, keep], found["test"][:, keep], labels, run, world)
    table = []
    for row in [*rows_of(backbone.title, backbone.columns, keep, [found]), *others]:
        table.append(probe_row(row, labels, config, world.device))
        run.print(line(table[-1]))
    metric = "balanced accuracy"
    if not config.exact:  # the sweep's number stands for the row
        metric, top1 = "top-1 accuracy", {f"{backbone.title}, {r.features}": r.top1 for r in sweeps}
        table = [{**row, "mean": top1[row["features"]], "std": 0.0, "runs": [top1[row["features"]]]} for row in table]
    classes = splits["train"].classes
    run.results(
        {
            "backbone": backbone.title,
            "task": f"{len(classes)} classes: {', '.join(classes[:10])}",
            "metric": metric,
            "metric_of_knn_and_few_shot": "balanced accuracy",
            "chance": 1 / len(classes),
            "majority": max(torch.bincount(labels["test"]).tolist()) / len(labels["test"]),
            "seeds": config.seeds,
            "images": {split: len(images) for split, images in splits.items()},
            "error": max(row["error"] for row in table),
            "rows": table,
            "sweep": [dataclasses.asdict(result) for result in sweeps],
            "notes": [labels_seen(config, trained)],
        }
    )
    run.print(f"probe: done; {run.path / 'results.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
