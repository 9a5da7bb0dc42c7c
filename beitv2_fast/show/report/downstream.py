"""What comes after pre-training, in the report: probes in full, fine-tunings, segmentations, other evaluation sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runs.folder import stored_config
from ...runs.logs import read_metrics
from ..plots import Panel, curve, rate_panel
from ..sheets import CAPTION
from .page import note, paragraph, table

Row = dict[str, Any]
Draw = Callable[[str, str], list[str]]  # (picture, caption) -> HTML, [] if there is no such picture
SCORES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}


@dataclass
class Downstream:
    """A run folder: results.json, the curves, and in words what is missing."""

    name: str
    results: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    evaluation: list[Row] = field(default_factory=list)
    start: str | None = None
    problem: str | None = None

    @property
    def models(self) -> dict[str, Row]:
        """The numbers of results.json by what was evaluated (weights, average, ...)."""
        return {name: values for name, values in self.results.items() if isinstance(values, dict)}


def read_downstream(run: Path) -> Downstream:
    """Never raises: what cannot be read is told in ``problem``."""
    found = Downstream(run.name)
    file = run / "results.json"
    try:
        found.start = stored_config(run).get("weights")
        found.metrics = read_metrics(run)
        found.evaluation = _evaluations(run, found.metrics)
        found.results = json.loads(file.read_text())
        if not isinstance(found.results, dict) or not (found.models or isinstance(found.results.get("rows"), list)):
            raise ValueError("it holds no scores")
    except FileNotFoundError:
        found.problem = f"There is no {file}: the run has not been evaluated."
    except (OSError, ValueError) as error:  # UserError, of a folder that is no run's, is a ValueError
        found.results, found.problem = {}, f"{file} cannot be read: {error}"
    return found


def _evaluations(run: Path, metrics: list[Row]) -> list[Row]:
    """The lines of evaluation.jsonl with the epoch of their step."""
    of_step = {line["step"]: line["epoch"] for line in metrics if "epoch" in line}
    rate = max(of_step.values()) / max(of_step) if of_step else None
    lines = read_metrics(run, "evaluation.jsonl")
    return lines if rate is None else [{**line, "epoch": line["step"] * rate} for line in lines]


def panels(run: Downstream) -> list[Panel]:
    """The training loss, and the first score of each model over the epochs."""
    score = next((key for key in SCORES if any(key in values for values in run.models.values())), None)
    scores = [c for name in run.models for c in curve(run.evaluation, name, f"{name}_{score}")]
    return [
        Panel("training loss, labels mixed and smoothed" if score == "top1" else "training loss",
              curve(run.metrics, "loss", "loss")),
        Panel(f"evaluation, {SCORES.get(score or '', '')}", scores[:2], percent=True),
        rate_panel(run.metrics),
    ]  # fmt: skip


def curve_pictures(runs: list[Downstream]) -> dict[str, tuple[str, list[Panel]]]:
    """(alternative text, panels) by picture."""
    return {_picture(i): (f"Curves of {run.name}", panels(run)) for i, run in enumerate(runs)}


def _picture(number: int) -> str:
    return f"downstream_{number}"


def body(runs: list[Downstream], figure: Draw) -> list[str]:
    """The section's HTML."""
    lines: list[str] = []
    for i, run in enumerate(runs):
        start = "random weights" if run.start in (None, "none") else run.start
        start = f", from {start}" if run.metrics else ""
        lines.append(paragraph(f"{run.name}{start}", "run"))
        if run.problem:
            lines.append(note(run.problem))
        if isinstance(run.results.get("rows"), list):
            lines.append(sets_table(run.results["rows"]))
        elif run.models:
            lines.append(scores_table(run))
        lines += figure(
            _picture(i),
            "Left: the loss in training. Middle: on the evaluation's images, the weights, and dashed what else "
            "is evaluated: their moving average or another procedure. Right: the learning rate of the head.",
        )
        lines += figure(f"overlays_{i}", CAPTION)
    return lines


def scores_table(run: Downstream) -> str:
    known = [key for key in SCORES if any(key in values for values in run.models.values())]
    if run.results.get("classes", 6) <= 5 and "top5" in known:
        known.remove("top5")  # always 1
    rows = []
    for name, values in run.models.items():
        scores = [f"{values[key]:.2%}" if key in values else "" for key in known]
        rows.append([name, *scores, f"{values['images']:,}" if "images" in values else ""])
    return table(["evaluated", *(SCORES[key] for key in known), "images"], rows)


def sets_table(rows: list[Row]) -> str:
    """A classifier on several folders, as train/evaluate.py writes it."""
    cells = [
        [f"{row['folder']}, {row['model']}", f"{row['top1']:.2%}", f"{row['top5']:.2%}" if row["classes"] > 5 else "",
         f"{row['classes']:,}", f"{row['images']:,}"]
        for row in rows
    ]  # fmt: skip
    return table(["folder, model", "top-1", "top-5", "classes", "images"], cells)


def probe_details(results: Row) -> list[str]:
    """Few-shot probes of every row, and the sweep of layers and learning rates."""
    lines: list[str] = []
    rows = [row for row in results.get("rows", []) if row.get("few_shot")]
    if rows:
        shots = list(rows[0]["few_shot"])
        body = []
        for row in rows:
            few = [row["few_shot"][n] for n in shots]
            body.append([row["features"], *(f"{f['mean']:.3f} ± {f['std']:.3f}" for f in few)])
        metric = results.get("metric_of_knn_and_few_shot", "balanced accuracy")
        said = f"{metric} of linear classifiers that saw this many images per class."
        lines += [paragraph(said[0].upper() + said[1:]), table(["features", *(f"{n}-shot" for n in shots)], body)]
    if swept := results.get("sweep"):
        fifth = any(row.get("top5") is not None for row in swept)
        head = ["features", "top-1", *(["top-5"] if fifth else []), "learning rate"]
        body = [
            [row["features"], f"{row['top1']:.2%}", *([f"{row['top5']:.2%}"] if fifth else []), f"{row['lr']:g}"]
            for row in swept
        ]
        said = (
            "Linear classifiers by SGD on several features at once; the learning rate is the best on a fifth of train."
        )
        lines += [paragraph(said), table(head, body)]
    return lines
