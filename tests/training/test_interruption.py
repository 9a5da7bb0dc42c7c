"""Trainings that are stopped by signals, killed while they save or run out of disk end with undisturbed ones' bits."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from beitv2_fast.config.training import TrainConfig
from beitv2_fast.distributed import World
from beitv2_fast.runs import checkpoints as on_disk
from beitv2_fast.runs import files
from beitv2_fast.runs.checkpoints import Checkpoints
from beitv2_fast.training import resume
from beitv2_fast.training.optim import TorchBackend

from ..support.training import (
    PRETRAIN,
    TINY,
    TOKENIZER,
    Halted,
    assert_same_bits,
    call,
    checkpoints,
    run_jobs,
    write_images,
)

pytestmark = pytest.mark.slow
STAGES = ("tokenizer", "pretrain")
# 12 steps; k-means on the first batch, and restarts of dead codes in step 8
LONG = {
    "tokenizer": [*TINY, *TOKENIZER, "--epochs", 4, "--save-every", 4, "--num-codes", 64, "--dead-after", 0.5],
    "pretrain": [*TINY, *PRETRAIN, "--epochs", 4, "--save-every", 4],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list]:
    """The options of both stages, and their undisturbed runs in ``whole``."""
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "images")
    options = {"tokenizer": [*LONG["tokenizer"], "--data", images]}
    options["pretrain"] = [*LONG["pretrain"], "--data", images, "--tokenizer", folder / "tokenizer"]
    for stage in STAGES:
        assert call(stage, *options[stage], "--out", folder / stage) == 0
    return {stage: [folder / stage, options[stage]] for stage in STAGES}


# (step, signal, to whom, workers, the step that it then resumes from)
INTERRUPTIONS = {
    "tokenizer": [
        (2, signal.SIGTERM, os.kill, 0, 2),
        (5, signal.SIGKILL, os.killpg, 2, 4),
        (7, signal.SIGTERM, os.killpg, 2, 7),  # the data workers get it too
    ],
    "pretrain": [
        (2, signal.SIGKILL, os.kill, 0, 0),
        (5, signal.SIGTERM, os.killpg, 2, 5),
        (9, signal.SIGKILL, os.kill, 2, 8),  # the data workers are left alone
    ],
}


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_killed_again_and_again_it_ends_with_the_same_bits(runs, tmp_path, capsys, stage):
    whole, options = runs[stage]
    options = [*options, "--out", tmp_path / "run"]
    resumed_at = 0
    for step, number, send, workers, saved in INTERRUPTIONS[stage]:
        training = Halted(stage, step, *options, "--workers", workers)
        assert f"resumed at step {resumed_at} of 12" in training.output or not resumed_at
        send(training.pid, number)
        if number == signal.SIGTERM:
            send(training.pid, number)  # launchers pass on what the group has already got
        code = training.go_on()  # returns once its last process has ended, the workers too
        assert code == (-number if number == signal.SIGKILL else 128 + number), training.output
        assert (f"stopped at step {step}, saved" in training.output) == (number == signal.SIGTERM)
        resumed_at = saved
    assert call(stage, *options) == 0
    assert f"resumed at step {resumed_at} of 12" in capsys.readouterr().out
    assert_same_bits(tmp_path / "run", whole)


def test_under_the_deepspeed_launcher_a_signal_to_the_group_saves_and_the_run_resumes_to_the_same_bits(runs, tmp_path):
    pytest.importorskip("deepspeed")
    _, options = runs["pretrain"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "--master_port", free_port()]
    stopped = Halted("pretrain", 5, *options, "--workers", 2, "--out", tmp_path / "run", launcher=launcher)
    os.killpg(stopped.pid, signal.SIGTERM)
    assert stopped.go_on() != 0
    assert "DeepSpeed ZeRO 0, " in stopped.output and "stopped at step 5, saved" in stopped.output
    rank = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    both = [("pretrain", [*options, "--local_rank", 0, "--out", tmp_path / name]) for name in ("run", "whole")]
    run_jobs(tmp_path, both, launcher=(sys.executable,), **rank)
    assert "resumed at step 5 of 12" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


WORLD = World(0, 1, torch.device("cpu"))


class Model(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((64,), value))
        self.register_buffer("codebook", torch.full((8, 4), value))


def backend(value: float) -> TorchBackend:
    """Weights, buffers and the optimizer's state are all this value."""
    model = Model(value)
    result = TorchBackend(model, [{"params": list(model.parameters())}], TrainConfig(), WORLD)
    moments = {f"weight.{name}": torch.full((64,), value) for name in ("exp_avg", "exp_avg_sq")}
    result.restore({**moments, "step": torch.tensor(value)})
    return result


SAVING = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (shutil, "rmtree"),
          (on_disk.json, "dumps"), (on_disk, "flush"), (files, "flush")]  # fmt: skip


def killed_at(call_number: int, folder: Path, step: int) -> bool:
    """Save in a child process that kills itself in that call of those in ``SAVING``; False: it had fewer calls.

    A kill in the writing of a file leaves half of it.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (signal.SIGKILL, 0)
        return status == signal.SIGKILL
    try:
        calls = 0

        def counting(function):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == call_number:
                    if function is save_weights:
                        function(*args, **kwargs)
                        os.truncate(args[1], args[1].stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        save_weights = resume.save_weights
        for module, name in [*SAVING, (resume, "save_weights")]:
            setattr(module, name, counting(getattr(module, name)))
        resume.save(Checkpoints(folder, keep=1), backend(float(step)), None, step, WORLD)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_kill_at_any_moment_of_saving_leaves_a_complete_checkpoint(tmp_path):
    resume.save(Checkpoints(tmp_path), backend(1.0), None, 1, WORLD)
    step, moment, resumed = 2, 1, []
    while killed_at(moment, tmp_path, step):
        model, optimizer = Model(0.0), {}
        load = lambda folder, m=model, o=optimizer: o.update(resume.read_checkpoint(folder, m, None)[1])  # noqa: E731
        found = Checkpoints(tmp_path).latest(load, pytest.fail)
        assert found in (step - 1, step)
        for value in [*model.state_dict().values(), *optimizer.values()]:
            assert torch.equal(value, torch.full_like(value, found))
        resumed.append(found == step)
        step, moment = found + 1, moment + 1
    assert moment > 15 and True in resumed and False in resumed  # kills before and after the new one became valid


def test_a_full_disk_while_saving_is_explained_and_leaves_the_checkpoint_before(runs, tmp_path, capsys):
    whole, options = runs["tokenizer"]
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a longer file cannot be written
    try:
        code = call("tokenizer", *options, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "the checkpoint of step 12 could not be written" in capsys.readouterr().err
    assert "step_00000012" not in checkpoints(tmp_path / "run")
    assert call("tokenizer", *options, "--out", tmp_path / "run") == 0
    assert "resumed at step 8 of 12" in capsys.readouterr().out
    assert_same_bits(tmp_path / "run", whole)
