"""The run folder: config.json, inputs.json, log.txt, metrics.jsonl, evaluation.jsonl, tensorboard/, checkpoints/."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ..config.options import C, RunConfig, fingerprint, from_json, to_json
from ..distributed import after_failure
from ..errors import UserError
from .files import write_atomically
from .logs import LOG, TIME, origin
from .sources import locate

CONFIG, LOCK = "config.json", ".lock"
INPUTS = "inputs.json"  # by the name of an option that is a path: a hash of what was there
RESULTS = ("checkpoints/step_*", "results.json")  # any of these: there is something to lose
WORK_BYTES = 2**20  # of the files that a start makes: a check of some 10,000 images
LOGS = ("metrics.jsonl", "evaluation.jsonl", "tensorboard")
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")


class RunFolder:
    """Opens a run folder for a config, or refuses if it belongs to another one. Only rank 0 writes.

    What a start that came to nothing left there is no obstacle: its logs are removed if its config was another one.

    Attributes:
        inputs: what INPUTS says. moved: the options with ``holds`` that name another place than when the run was there
            last.
    """

    def __init__(self, config: RunConfig, rank: int = 0):
        self.path, self.writes, self.config = config.out, rank == 0, config
        self.started = time.monotonic()
        self._tensorboard: Any = None
        self.inputs: dict[str, str] = {}
        self.moved: set[str] = set()
        stale = self._refuse_another()
        if not self.writes:
            return
        if not self.path.exists():
            after_failure.append(self._remove_if_worthless)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
            for name in LOGS if stale else ():
                _remove(self.path / name)
            if not has_results(self.path):
                self.accept()
            self._note(origin())
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error}. Choose another --out.") from error

    def accept(self, **inputs: str) -> None:
        """Write down the config and what its paths hold. A folder with results stays as it is until the run goes on."""
        if not self.writes:
            return
        places = {f.name: getattr(self.config, f.name) for f in held(self.config, "weights", "start")}
        found = {name: content(Path(place)) for name, place in places.items() if place and name not in self.inputs}
        self.inputs |= {name: value for name, value in found.items() if value is not None} | inputs
        write_atomically(self.path / CONFIG, json.dumps(to_json(self.config), indent=2) + "\n")
        write_atomically(self.path / INPUTS, json.dumps(self.inputs, indent=2) + "\n")

    def _refuse_another(self) -> bool:
        """Whether the folder holds what is left of a run with another config, and nothing to lose."""
        file = self.path / CONFIG
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file, but a run needs a folder. Choose another --out.")
        if file.exists():
            return self._differs(stored_config(self.path))
        if self.writes and any(not p.name.startswith((LOCK, f".{CONFIG}")) for p in self.path.iterdir()):
            raise UserError(f"{self.path} exists and is no run folder (it has no {CONFIG}). Choose another --out.")
        return False

    def _differs(self, stored: dict[str, Any]) -> bool:
        """UserError if there are results of another config; whether it was another."""
        inputs, wanted = _read_inputs(self.path), fingerprint(self.config)
        fields = {f.name: f for f in dataclasses.fields(self.config)}
        stages = stored["stage"], self.config.stage
        another = None not in stages and stages[0] != stages[1]
        different = ["stage: {} there, {} now".format(*stages)] if another else []
        # An option that the version which made the run did not have yet was at its default.
        defaults = fingerprint(type(self.config)()) if stored.keys() <= {"stage", *fields} else {}
        for name, value in () if another else wanted.items():
            there, holds = stored.get(name, defaults.get(name, "(absent)")), fields[name].metadata["holds"]
            stays = (
                same_place(there, value) if isinstance(getattr(self.config, name), Path) or holds else there == value
            )
            if holds and not stays:
                self.moved.add(name)
            if holds == "images":
                continue  # they are compared when they have been found
            known = inputs.get(name) if isinstance(value, str) else None
            if known is not None and (not stays or holds == "weights"):
                stays = content(Path(value)) == known
            if not stays:
                at = f"other weights than at the start, in {value}"
                different.append(at if there == value else f"{name}: {there} there, {value} now")
        if not has_results(self.path):
            return bool(different)
        if different:
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(different)}). Nothing was changed. "
                "Choose another --out, give the same options to resume it, or remove the folder."
            )
        self.inputs = inputs
        return False

    def _remove_if_worthless(self) -> None:
        """What a failed start made goes, unless some of it took long: a folder, results, a check of many images."""
        files = list(self.path.glob("*"))
        work = any(file.is_dir() or file.match("bad_batch_*") for file in files) or has_results(self.path)
        if not work and sum(file.stat().st_size for file in files) < WORK_BYTES:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def print(self, text: str) -> None:
        """A line in log.txt, and then on the console, beside a progress bar if there is one."""
        if not self.writes:
            return
        from tqdm import tqdm

        self._note(text)
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _note(self, text: str) -> None:
        with (self.path / LOG).open("a") as file:
            file.write(f"{time.strftime(TIME)}  {text}\n")

    def metrics(self, step: int, values: dict[str, float], file: str = "metrics.jsonl") -> None:
        """A line of metrics.jsonl and TensorBoard's scalars. A resumed run repeats steps: the last line counts."""
        if not self.writes:
            return
        with (self.path / file).open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def results(self, content: dict[str, Any]) -> None:
        """results.json."""
        if self.writes:
            write_atomically(self.path / "results.json", json.dumps(content, indent=2) + "\n")

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


def read_config(cls: type[C], path: Path) -> C:
    """The config of a finished or interrupted run; UserError if it is one of another stage."""
    values = stored_config(path)
    if values["stage"] not in (None, cls.stage):
        raise UserError(f"{path} is a run folder of {values['stage']}, but {cls.stage}'s is needed. Name another one.")
    try:
        return from_json(cls, values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG} is no config of this version: {error}. Name another run.") from error


def stored_config(path: Path) -> dict[str, Any]:
    """The values in a run folder's config.json, and its "stage"; None if that is unknown."""
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} is no run folder: it has no {CONFIG}. Train that stage first, or name its folder.")
    try:
        values: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it, or use another run folder.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} does not hold a config. Restore it, or use another run folder.")
    return {"stage": _stage_of_old(values), **{_RENAMED.get(name, name): value for name, value in values.items()}}


_RENAMED = {"neighbours": "neighbors"}  # by earlier versions  # codespell:ignore neighbours


def _stage_of_old(values: dict[str, Any]) -> str | None:
    """The stage of a config written by a version that did not say it, by an option that the stages before lack."""
    stages = {"auxiliary_weight": "segment", "layer_decay": "finetune", "num_codes": "tokenizer"}
    stages |= {"num_masked": "pretrain", "backbone": "probe", "classes": "evaluate", "code_rows": "report"}
    stages |= {"max_images": "tokenizer_quality"}
    return next((stage for option, stage in stages.items() if option in values), None)


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


def has_results(path: Path) -> bool:
    """Whether a run folder has something to lose."""
    return any(next(path.glob(name), None) is not None for name in RESULTS)


def held(config: RunConfig, *kinds: str) -> list[dataclasses.Field]:
    """The options whose ``holds`` is one of these."""
    return [f for f in dataclasses.fields(config) if f.metadata["holds"] in kinds]


def is_run_folder(path: Path) -> bool:
    """Whether a folder's config.json is one of a training here, and not of a model as hubs keep them."""
    return (path / CONFIG).is_file() and not {"model_type", "architecture"} & stored_config(path).keys()


def content(source: Path) -> str | None:
    """A hash of weights, wherever they lie: a file's, a run folder's newest checkpoint's, a folder's; None for none.

    Of a name or a URL (see ``locate``) it is that of what has been fetched.
    """
    path = locate(source, fetch=False)
    folder = max(path.glob("checkpoints/step_*"), default=path)
    patterns = ("model.safetensors",) if folder != path else WEIGHTS
    files = [path] if path.is_file() else sorted(file for pattern in patterns for file in folder.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as part:
            while block := part.read(2**22):
                digest.update(block)
    return digest.hexdigest() if files else None


def same_place(one: Any, two: Any) -> bool:
    """Whether two values are equal, or paths of one file or folder."""
    if isinstance(one, str) and isinstance(two, str):
        return Path(one).resolve() == Path(two).resolve()
    return one == two


def _read_inputs(path: Path) -> dict[str, str]:
    """What a run folder's INPUTS says; {} in one of an earlier version."""
    try:
        return dict(json.loads((path / INPUTS).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
