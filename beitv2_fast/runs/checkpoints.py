"""Checkpoints that a kill at any moment leaves loadable: written beside, flushed, then renamed.

checkpoints/step_00000200/model.safetensors   weights and buffers (codebook included)
                          optimizer.safetensors   AdamW's moments by parameter name, and its step
                          ema.safetensors     the average of the weights, where a training keeps one
                          training.json       the step, images per step, ...
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UserError, require
from .files import flush

# where trainings keep the weights, from the outside in; an average of them is taken if there is nothing else
WRAPPINGS = ("model", "module", "state_dict", "model_ema", "state_dict_ema", "ema", "ema_state_dict")


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Parameters and persistent buffers as safetensors."""
    safetensors = require("safetensors", "train", "Saving a checkpoint")
    save_file = require("safetensors.torch", "train", "Saving a checkpoint").save_file
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, path, metadata)
    except safetensors.SafetensorError as error:  # its only word for a full disk
        raise OSError(str(error)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors file, or a .pth/.pt file of plain tensors (weights_only: no code in it is run).

    Of a dict with "model", "module", "state_dict" or else an average of the weights in it, as trainings store it, that
    part is taken. Beside tensors a file may hold plain Python values and an argparse.Namespace, which is what the
    reference keeps its options in.

    Raises:
        CheckpointError: it cannot be read; of a file with other types in it they are named.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            return require("safetensors.torch", "train", "Reading a checkpoint").load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # every library has its own exceptions for a damaged file
        if isinstance(error, pickle.UnpicklingError):  # torch's own text tells to run whatever is in the file
            raise CheckpointError(_types_in(path, str(error))) from error
        raise CheckpointError(_unreadable(path, str(error).strip().split("\n")[0][:200])) from error
    for wrapping in WRAPPINGS:
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, but a dict of tensors is needed.")
    return state


def _unreadable(path: Path, reason: str) -> str:
    return (
        f"{path} cannot be read as a checkpoint ({reason}): it is damaged or of another kind. "
        "Use an intact .safetensors, .pth or .pt file."
    )


def _types_in(path: Path, said: str) -> str:
    """What is wrong with a pickle that is not run, of which torch said this, and what its owner can do."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an older kind of file, of which torch names the first
        names = re.findall(r"Unsupported (?:global|class)[^.]*? ([\w.]+) was not", said)
    if not names:
        return _unreadable(path, "no PyTorch file of plain tensors")
    return (
        f"{path} is no PyTorch file of plain tensors: it holds {', '.join(names[:8])}, and nothing in a checkpoint is "
        "run here. If you trust its source, write only the weights, in Python: state = torch.load(FILE, "
        'weights_only=False); torch.save(state["model"], "weights.pth"), with the name that they have in it.'
    )


def load_model(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load all of a state dict, or raise an error that names every missing, unexpected and reshaped entry."""
    own = model.state_dict()
    reshaped = [
        f"{name} ({list(value.shape)} in the file, {list(own[name].shape)} in the model)"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    found = {
        "missing": compact([name for name in own if name not in state]),
        "unexpected": compact([name for name in state if name not in own]),
        "of another shape": reshaped,
    }
    problems = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    if problems:
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}. {'; '.join(problems)}")
    model.load_state_dict(state)


def compact(names: list[str]) -> list[str]:
    """Names that differ only in a block's number as one, with the range of numbers: blocks.0-11.gamma_1."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        template = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        found = re.search(r"\.(\d+)\.", name)
        numbers.setdefault(template, []).extend([int(found[1])] if found else [])
    return [template.replace("{}", _ranges(found)) for template, found in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(keep, 1)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first. A folder has its final name only once everything in it is on disk."""
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir())

    def unfinished(self, step: int) -> Path:
        """The folder that a checkpoint is written into until ``commit`` gives it its name."""
        return self.folder / f".writing_{step:08d}"

    def finished(self, step: int) -> Path:
        """Where ``commit`` puts the checkpoint of a step."""
        return self.folder / f"step_{step:08d}"

    def begin(self, step: int) -> None:
        """Make that folder, empty."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".writing_*"):
            shutil.rmtree(stale)
        self.unfinished(step).mkdir()

    def commit(self, step: int, **about: object) -> None:
        """Flush everything to disk, rename, and remove what ``keep`` no longer covers, unless it is a milestone.

        ``about``: for training.json; a true "milestone" is one.
        """
        temporary = self.unfinished(step)
        (temporary / "training.json").write_text(json.dumps({"step": step, **about}))
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        final = self.finished(step)
        if final.exists():
            self._remove(final)
        temporary.rename(final)
        flush(self.folder)
        for old in self.all()[: -self.keep]:
            if not json.loads((old / "training.json").read_text()).get("milestone"):
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """First the name goes: a kill in between leaves no half of a checkpoint under a complete one's name."""
        nameless = self.folder / f".writing_{checkpoint.name}"
        checkpoint.rename(nameless)
        shutil.rmtree(nameless)

    def latest(self, load: Callable[[Path], None], warn: Callable[[str], None]) -> int:
        """Load the newest checkpoint that can be read; returns its step, 0 if there is none.

        A damaged one is reported and the one before it is tried; if none of several can be read, that is an error.
        """
        problems = []
        for path in reversed(self.all()):
            try:
                load(path)
                return int(json.loads((path / "training.json").read_text())["step"])
            except (CheckpointError, OSError, ValueError, KeyError) as error:
                problems.append(f"{path.name}: {error}")
                warn(f"checkpoint {path} cannot be used ({error}); trying the one before it")
        if problems:
            raise CheckpointError(f"no checkpoint in {self.folder} can be loaded: {' | '.join(problems)}")
        return 0


def latest_weights(run: Path) -> Path:
    """model.safetensors of the newest checkpoint of a run folder."""
    checkpoints = Checkpoints(run / "checkpoints").all()
    if not checkpoints:
        raise CheckpointError(f"{run} has no checkpoint yet. Let its training reach one, or name another run folder.")
    return checkpoints[-1] / "model.safetensors"
