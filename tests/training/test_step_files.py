"""How many files of the project an ordinary pre-training step enters: a reader can follow it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from beitv2_fast.training.log import TrainingLog

from ..support.training import PRETRAIN, ROOT, TINY, TOKENIZER, call, write_images


class Files:
    """The files of the project whose functions are called between ``start`` and ``stop``, in any thread."""

    def __init__(self) -> None:
        self.entered: set[str] = set()

    def start(self) -> None:
        for profiler in (sys, threading):
            profiler.setprofile(self._note)

    def stop(self) -> None:
        for profiler in (sys, threading):
            profiler.setprofile(None)

    def _note(self, frame, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and not name.startswith("<") and frame.f_code.co_name != "<module>":
            file = Path(name).resolve()
            if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] not in (".venv", "tests"):
                self.entered.add(str(file.relative_to(ROOT)))


def between_steps(monkeypatch, first: int, second: int, do: tuple[Callable[[], None], Callable[[], None]]) -> None:
    """Call the one after the first of these steps and the other after the second."""
    add = TrainingLog.add

    def add_and_do(self, step, *args):
        add(self, step, *args)
        if step in (first, second):
            do[step == second]()

    monkeypatch.setattr(TrainingLog, "add", add_and_do)


def test_a_pre_training_step_enters_at_most_25_files(tmp_path, monkeypatch):
    """Step 5 of 9, which decodes, crops and jitters, and neither logs nor saves nor ends an epoch."""
    images = write_images(tmp_path / "images")
    assert call("tokenizer", *TINY, *TOKENIZER, "--data", images, "--out", tmp_path / "tokenizer") == 0
    files = Files()
    between_steps(monkeypatch, 4, 5, (files.start, files.stop))
    options = [*TINY, *PRETRAIN, "--data", images, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run"]
    options += ["--no-in-memory", "--loader", "torchvision", "--crop-scale", 0.2, 1, "--color-jitter", 0.4]
    assert call("pretrain", *options, "--save-every", 100) == 0
    assert {"beitv2_fast/training/loop.py", "train/pretrain.py", "beitv2_fast/data/views.py"} <= files.entered
    assert len(files.entered) <= 25, "\n".join(sorted(files.entered))
