"""What the report tells of: run folders, interrupted or incomplete ones too, and the codes of the photographs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...models.student import Student
from ...models.tokenizer import Tokenizer
from ...runs.folder import is_run_folder
from ...runs.logs import read_metrics
from ...weights.create import open_model, paper_config


@dataclass
class Stage:
    """One training: its model and config where there are any, its log, and in words what is missing.

    own_options: whether the config is that of a run folder.
    """

    model: Any = None
    config: Any = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    problem: str | None = None
    own_options: bool = True
    evaluation: list[dict[str, float]] = field(default_factory=list)  # what was measured after epochs

    @property
    def unfinished(self) -> str | None:
        """How far a training that has not reached its last epoch has come."""
        if self.config is None or not self.metrics:
            return None
        epoch = self.metrics[-1].get("epoch", self.config.epochs)
        return f"epoch {epoch:.1f} of {self.config.epochs}" if epoch < self.config.epochs - 1e-6 else None


def read_stage(run: Path | None, kind: type[Tokenizer] | type[Student]) -> Stage:
    """A tokenizer's or a pre-training's run folder; what is missing becomes ``problem``.

    Raises:
        UserError: the folder is a run of the other kind.
    """
    if run is None:
        return Stage(problem="No run folder was named for this stage.")
    metrics = read_metrics(run)
    try:
        model, config = open_model(run)
    except UserError as error:
        return Stage(metrics=metrics, problem=str(error))
    if not isinstance(model, kind):
        wanted, found = ("tokenizer", "pre-training") if kind is Tokenizer else ("pre-training", "tokenizer")
        raise UserError(f"{run} is the run folder of a {found}, where that of a {wanted} was expected. Swap the two?")
    if config is None and isinstance(model, Student):
        config = paper_config(model.config)  # whose masks are shown; nothing tells those of its training
    evaluation = read_metrics(run, "evaluation.jsonl")
    return Stage(model.requires_grad_(False), config, metrics, own_options=is_run_folder(run), evaluation=evaluation)


def read_results(probe: Path | None) -> tuple[dict[str, Any] | None, str | None]:
    """(what linear_probe.py wrote, None), or (None, why there is nothing)."""
    file = None if probe is None else probe / "results.json"
    if file is None or not file.is_file():
        return None, f"The probe has not been run yet: there is no {file or 'results.json'}."
    try:
        results = json.loads(file.read_text())
        if not all({"features", "mean", "std"} <= row.keys() for row in results["rows"]):
            raise ValueError("its rows lack features, mean or std")
        return results, None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{file} cannot be read: {error}"
