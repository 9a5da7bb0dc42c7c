"""The run folder: config.json, log.txt, metrics.jsonl, tensorboard/, checkpoints/, report/."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import RunConfig, fingerprint, from_json, to_json
from .errors import UserError


class RunFolder:
    """Opens a run folder for a config, or refuses if it belongs to another one. Only rank 0 writes."""

    def __init__(self, config: RunConfig, rank: int = 0):
        self.path, self.writes = config.out, rank == 0
        self.started = time.monotonic()
        self._tensorboard = None
        file = self.path / "config.json"
        if file.exists():
            _check_same(config, file)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())) and self.writes:
            raise UserError(f"{self.path} exists and is no run folder (it has no config.json). Choose another --out.")
        if self.writes:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(to_json(config), indent=2) + "\n")
            except OSError as error:
                raise UserError(f"cannot write the run folder {self.path}: {error}. Choose another --out.") from error

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def print(self, text: str) -> None:
        """A line on the console (beside a progress bar, if there is one) and in log.txt."""
        if not self.writes:
            return
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        with (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl and TensorBoard's scalars. A resumed run repeats steps: the last line counts."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
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
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{path} is no run folder: it has no config.json. Train that stage first, or name its folder.")
    return from_json(cls, json.loads(file.read_text()))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old content or the new, nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check_same(config: RunConfig, file: Path) -> None:
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Choose another --out, or remove the folder.") from error
    wanted = fingerprint(config)
    different = [name for name in wanted if stored.get(name, "(absent)") != wanted[name]]
    if different:
        listed = "; ".join(f"{name}: {stored.get(name)} there, {wanted[name]} now" for name in different)
        raise UserError(
            f"{file.parent} holds a run with another config ({listed}). Nothing was changed. "
            "Choose another --out, give the same options to resume it, or remove the folder."
        )
