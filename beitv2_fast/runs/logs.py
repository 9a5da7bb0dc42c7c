"""What a run folder's metrics.jsonl and log.txt say."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from .. import __version__
from ..errors import UserError

LOG, TIME = "log.txt", "%Y-%m-%d %H:%M:%S"
STARTED = "started by "


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


def origin() -> str:
    """The first line of a process in a run's log: versions, machine, command line."""
    versions = f"beitv2-fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{STARTED}{versions} on {_machine()}: {shlex.join(sys.orig_argv)}"


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return f"{os.cpu_count()} x {named[1] if named else platform.machine()}"


@dataclass(frozen=True)
class Start:
    """A process that worked in a run folder: versions and machine, command line, minutes to its last line."""

    what: str
    command: str
    minutes: float


def read_starts(run: Path) -> list[Start]:
    """Those that log.txt tells of; none in a run folder of an earlier version."""
    file = run / LOG
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)$", text, re.MULTILINE)
    times = [datetime.strptime(when, TIME) for when, _ in lines]
    firsts = [i for i, (_, text) in enumerate(lines) if text.startswith(STARTED)]
    found = []
    for first, following in zip(firsts, [*firsts[1:], len(lines)], strict=False):
        what, _, command = lines[first][1].removeprefix(STARTED).partition(": ")
        found.append(Start(what, command, (times[following - 1] - times[first]).total_seconds() / 60))
    return found
