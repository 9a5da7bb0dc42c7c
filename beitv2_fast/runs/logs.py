"""What a run folder's metrics.jsonl says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    """The lines of metrics.jsonl, or of another such file, by step.

    A resumed run repeats steps: the last line counts; a cut line does not.
    """
    by_step: dict[int, dict[str, float]] = {}
    file = run / name
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
            by_step[int(values["step"])] = values
        except (ValueError, KeyError, TypeError):
            continue
    return [by_step[step] for step in sorted(by_step)]


def is_best(run: Path, step: int, score: float, ending: str) -> bool:
    """Whether evaluation.jsonl has no score as high of an earlier step, under any name with this ending.

    Later steps are of a run that has been resumed and repeats them.
    """
    lines = (line for line in read_metrics(run, "evaluation.jsonl") if line["step"] < step)
    return all(score > value for line in lines for name, value in line.items() if name.endswith(ending))


def read_logs(runs: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    """``read_metrics`` of several runs by the ends of their paths, as long as it takes to tell them apart.

    Raises:
        UserError: a run is named twice.
    """
    return {name: read_metrics(run) for name, run in zip(short_names(runs), runs, strict=True)}


def short_names(runs: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart."""
    whole = [run.resolve().parts for run in runs]
    if len(set(whole)) < len(whole):
        raise UserError("a run is named twice. Name each once.")
    length = next(
        n for n in range(1, max(map(len, whole), default=1) + 1) if len({p[-n:] for p in whole}) == len(whole)
    )
    return ["/".join(parts[-length:]) for parts in whole]
