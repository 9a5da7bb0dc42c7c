"""How many files of the project an ordinary pre-training step enters: a reader can follow it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.training.monitor import TrainingLog

from ..support.small_runs import small_tokenizer
from ..support.training import PRETRAIN, ROOT, TINY, call, write_images


class Files:
    """The files of the project whose functions are called between ``start`` and ``stop``, in any thread."""

    def __init__(self) -> None:
        self.entered: set[str] = set()

    def start(self) -> None:
        for thread in (sys, threading):
            thread.setprofile(self._note)

    def stop(self) -> None:
        for thread in (sys, threading):
            thread.setprofile(None)

    def _note(self, frame, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename).resolve()
        if event == "call" and file.is_file() and file.is_relative_to(ROOT) and frame.f_code.co_name != "<module>":
            self.entered.add(file.relative_to(ROOT).as_posix())

    def of_the_project(self) -> list[str]:
        return sorted(file for file in self.entered if not file.startswith((".venv/", "tests/")))


def test_a_pre_training_step_enters_at_most_27_files(tmp_path, monkeypatch):
    """Step 5 of 9, which decodes, crops and jitters, and neither logs nor saves nor ends an epoch."""
    files, add = Files(), TrainingLog.add

    def add_and_watch(self, step, *args):
        add(self, step, *args)
        if step in (4, 5):
            files.start() if step == 4 else files.stop()

    images, tokenizer = write_images(tmp_path / "images"), small_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(TrainingLog, "add", add_and_watch)
    options = [*TINY, *PRETRAIN, "--data", images, "--tokenizer", tokenizer, "--out", tmp_path / "run"]
    options += ["--no-in-memory", "--loader", "torchvision", "--crop-scale", 0.2, 1, "--color-jitter", 0.4]
    assert call("pretrain", *options, "--save-every", 100) == 0
    entered = files.of_the_project()
    assert {"beitv2_fast/training/loop.py", "train/pretrain.py", "beitv2_fast/data/views.py"} <= set(entered)
    assert len(entered) <= 27, "\n".join(entered)


def test_a_quantizer_s_training_step_enters_at_most_7_files():
    quantizer, vectors, files = FusedVectorQuantizer(64, 8), torch.randn(4, 16, 8, requires_grad=True), Files()
    quantizer(vectors).loss.backward()
    files.start()
    quantizer(vectors).loss.backward()
    files.stop()
    entered = files.of_the_project()
    assert "beitv2_fast/quantize/quantizer.py" in entered
    assert len(entered) <= 7, "\n".join(entered)
