"""The run folder: config.json, log.txt, metrics.jsonl, evaluation.jsonl, tensorboard/, checkpoints/, report/."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from .config import RunConfig, fingerprint, from_json, to_json
from .errors import UserError

CONFIG, LOCK = "config.json", ".lock"
RESULTS = ("checkpoints", "metrics.jsonl", "results.json")  # any of these: there is something to lose


class RunFolder:
    """Opens a run folder for a config, or refuses if it belongs to another one. Only rank 0 writes."""

    def __init__(self, config: RunConfig, rank: int = 0):
        self.path, self.writes = config.out, rank == 0
        self.started = time.monotonic()
        self._tensorboard = None
        self._refuse_another(config)
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
            write_atomically(self.path / CONFIG, json.dumps(to_json(config), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error}. Choose another --out.") from error

    def _refuse_another(self, config: RunConfig) -> None:
        file = self.path / CONFIG
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file, but a run needs a folder. Choose another --out.")
        if file.exists():
            _check_same(config, file)
        elif self.writes and any(not p.name.startswith((LOCK, f".{CONFIG}")) for p in self.path.iterdir()):
            raise UserError(f"{self.path} exists and is no run folder (it has no {CONFIG}). Choose another --out.")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def print(self, text: str) -> None:
        """A line in log.txt, and then on the console, beside a progress bar if there is one."""
        if not self.writes:
            return
        from tqdm import tqdm

        with (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def metrics(self, step: int, values: dict[str, float], file: str = "metrics.jsonl") -> None:
        """A line of metrics.jsonl and TensorBoard's scalars. A resumed run repeats steps: the last line counts."""
        if not self.writes:
            return
        with (self.path / file).open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """A picture [3, H, W] in [0, 1] for TensorBoard."""
        if self.writes:
            self.tensorboard.add_image(name, image.clamp(0, 1), step)

    @property
    def tensorboard(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.path / "tensorboard")
        return self._tensorboard

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_config(cls: type[RunConfig], path: Path) -> RunConfig:
    """The config of a finished or interrupted run."""
    try:
        return from_json(cls, stored_config(path))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG} is no config of this version: {error}. Name another run.") from error


def stored_config(path: Path) -> dict[str, Any]:
    """The values in a run folder's config.json."""
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} is no run folder: it has no {CONFIG}. Train that stage first, or name its folder.")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it, or use another run folder.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} does not hold a config. Restore it, or use another run folder.")
    return values


def lock(path: Path) -> TextIO:
    """Hold a run folder until the file that is returned is closed or the process ends, however it ends.

    Worker processes do not inherit the lock (POSIX record locks belong to one process).
    """
    file = (path / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(
            f"another process is writing to the run folder {path}: {file.read() or 'unknown'}. Wait until it has "
            "ended, stop it (`kill` lets it save first), or choose another --out."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old content or the new, nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check_same(config: RunConfig, file: Path) -> None:
    stored, wanted = stored_config(file.parent), fingerprint(config)
    different = [name for name in wanted if stored.get(name, "(absent)") != wanted[name]]
    if different and any((file.parent / name).exists() for name in RESULTS):
        listed = "; ".join(f"{name}: {stored.get(name)} there, {wanted[name]} now" for name in different)
        raise UserError(
            f"{file.parent} holds a run with another config ({listed}). Nothing was changed. "
            "Choose another --out, give the same options to resume it, or remove the folder."
        )
