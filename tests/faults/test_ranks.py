"""Two ranks: one is killed, hangs or computes NaN, or their launcher dies. Nothing is lost, nothing waits for ever."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from ..support.training import (
    PRETRAIN,
    TINY,
    TOKENIZER,
    TORCHRUN,
    Halted,
    assert_same_bits,
    call,
    losses,
    run,
    run_jobs,
    write_images,
)
from ..training.test_distributed import settings
from ..training.test_interruption import free_port

pytestmark = pytest.mark.faults
STEPS = 12
RUNS = 50  # in a row that have to end with exit code 0


def deepspeed_launcher() -> list[str]:
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", free_port()]


def launcher(name: str) -> list[str]:
    return TORCHRUN if name == "torchrun" else deepspeed_launcher()


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, list]:
    """Two ranks' options for both stages, and a trained tokenizer."""
    folder = tmp_path_factory.mktemp("options")
    common = [*TINY, "--epochs", 4, "--save-every", 4, "--data", write_images(folder / "images"), "--no-in-memory"]
    result = {"tokenizer": [*common, *TOKENIZER], "pretrain": [*common, *PRETRAIN, "--tokenizer", folder / "tokenizer"]}
    assert call("tokenizer", *result["tokenizer"], "--out", folder / "tokenizer") == 0
    return {stage: [*given, "--batch-size", 2] for stage, given in result.items()}


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Run folders of (stage, launcher)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    # Of one process with two micro-batches, which has the bits of two ranks under torchrun.
    assert call("tokenizer", *options["tokenizer"], "--accumulate", 2, "--out", folder / "tokenizer") == 0
    assert call("pretrain", *options["pretrain"], "--accumulate", 2, "--out", folder / "pretrain") == 0
    done = run("pretrain", *options["pretrain"], "--out", folder / "deepspeed", launcher=launcher("deepspeed"))
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        ("tokenizer", "torchrun"): folder / "tokenizer",
        ("pretrain", "torchrun"): folder / "pretrain",
        ("pretrain", "deepspeed"): folder / "deepspeed",
    }


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ranks_of(launcher: int) -> dict[int, int]:
    """The process of each rank below a launcher, found by the environment that it gave it."""
    found: dict[int, int] = {}
    children, waiting = [], [launcher]
    while waiting:
        pid = waiting.pop()
        children.append(pid)
        waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in sorted(children):
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        rank = next((int(e.removeprefix("RANK=")) for e in environment if e.startswith("RANK=")), None)
        if rank is not None:
            found.setdefault(rank, pid)  # its data workers look alike, but are younger
    return found


@pytest.mark.parametrize(("stage", "name"), [("tokenizer", "torchrun"), ("pretrain", "deepspeed")])
def test_a_rank_killed_at_a_random_step_resumes_to_the_same_bits(options, undisturbed, tmp_path, stage, name):
    given = [*options[stage], "--out", tmp_path / "run", "--workers", 1]
    step, rank = random.SystemRandom().randrange(1, STEPS), random.SystemRandom().randrange(2)
    training = Halted(stage, step, *given, launcher=launcher(name))
    os.kill(ranks_of(training.pid)[rank], signal.SIGKILL)
    assert training.go_on() != 0, f"rank {rank} killed at step {step}"  # returns when the last process has ended
    again = run(stage, *given, launcher=launcher(name))
    assert again.returncode == 0, again.stderr[-3000:]
    assert (f"resumed at step {step // 4 * 4} of 12" in again.stdout) == (step >= 4), (rank, step)
    assert_same_bits(tmp_path / "run", undisturbed[stage, name])


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_ranks_whose_launcher_is_killed_save_and_stop_and_resume_to_the_same_bits(options, undisturbed, tmp_path, name):
    given = [*options["pretrain"], "--out", tmp_path / "run"]
    training = Halted("pretrain", 5, *given, launcher=launcher(name))
    ranks = ranks_of(training.pid)
    killed = parent(ranks[0])
    os.kill(killed, signal.SIGKILL)
    while killed in (parent(ranks[0]), parent(ranks[1])):  # until it is dead
        os.sched_yield()
    training.go_on()  # returns when the last process has ended: nothing is left that holds the run folder
    assert "stopped at step 5, saved" in training.output
    again = run("pretrain", *given, launcher=launcher(name))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step 5 of 12" in again.stdout
    assert_same_bits(tmp_path / "run", undisturbed["pretrain", name])


def test_a_killed_deepspeed_runner_leaves_ranks_that_the_next_start_names_and_that_stop_and_resume_to_the_same_bits(
    options, undisturbed, tmp_path
):
    """The process that the user started is the parent of the launcher whose death the ranks notice."""
    given = [*options["pretrain"], "--out", tmp_path / "run"]
    training = Halted("pretrain", 5, *given, launcher=launcher("deepspeed"))
    ranks = ranks_of(training.pid)
    assert parent(parent(ranks[0])) == training.pid
    os.kill(training.pid, signal.SIGKILL)
    training.process.wait()
    refused = run("pretrain", *given, launcher=launcher("deepspeed"))
    assert refused.returncode != 0
    assert f"another process is writing to the run folder {tmp_path / 'run'}: process {ranks[0]} on" in refused.stderr
    os.kill(ranks[0], signal.SIGTERM)
    training.go_on()  # returns when the last process has ended
    assert "stopped at step 5, saved" in training.output
    again = run("pretrain", *given, launcher=launcher("deepspeed"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step 5 of 12" in again.stdout
    assert_same_bits(tmp_path / "run", undisturbed["pretrain", "deepspeed"])


def test_a_hang_of_one_rank_ends_with_the_stacks_of_all(options, tmp_path):
    given = [*options["pretrain"], "--out", tmp_path / "run", "--hang-after", 8]
    training = Halted("pretrain", 3, *given, launcher=TORCHRUN, HALTED_RANK="1")
    training.output += training.process.stdout.read()
    training.watchdog.cancel()
    assert training.process.wait() != 0
    hung, waiting = ((tmp_path / "run" / f"hang_rank_{rank}.txt").read_text() for rank in (1, 0))
    assert "no step in 8 seconds" in hung and "no step in 8 seconds" in waiting
    assert "in add_and_halt" in hung and "in add_and_halt" not in waiting.partition("in add\n")[0]
    assert "all_reduce" in waiting or "backward" in waiting  # where the other rank waits for it


def test_nan_on_one_rank_is_skipped_by_all_under_every_zero_stage(options, tmp_path):
    jobs: list[tuple[str, list]] = [("poison", ["1", "6"])]
    names = ("torch", "zero0", "zero1", "zero2", "zero3", "zero2_offload")
    (tmp_path / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    for name in names:
        zero = settings(name, tmp_path) if name[-1] not in "h0" else ["--deepspeed-config", tmp_path / "zero0.json"]
        jobs.append(("pretrain", [*options["pretrain"], "--out", tmp_path / name, *(zero if name != "torch" else [])]))
    run_jobs(tmp_path, jobs)
    for name in names:
        about = json.loads((tmp_path / name / "checkpoints" / "step_00000012" / "training.json").read_text())
        assert about["skipped_steps"] == 1, name
        assert losses(tmp_path / name)[-1] == pytest.approx(losses(tmp_path / "torch")[-1], rel=1e-5), name


def test_fifty_runs_of_two_ranks_in_a_row_end_with_exit_code_0(options, tmp_path):
    """gloo's threads once outlived the interpreter and aborted it: see ``run_main``."""
    codes = []
    for i in range(RUNS):
        more = ["--epochs", 1, "--out", tmp_path / str(i)]
        codes.append(run("pretrain", *options["pretrain"], *more, launcher=TORCHRUN).returncode)
    assert codes == [0] * RUNS
