"""What goes wrong while a training runs ends with a clear message or with no bit changed, and never in a hang.

docs/reliability.md lists every fault and its test. Those that need several ranks or minutes are in tests/faults.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from beitv2_fast.errors import CheckpointError
from beitv2_fast.quantize.collapse import CollapseWatch
from beitv2_fast.runs.checkpoints import read_weights
from beitv2_fast.train import tokenizer
from beitv2_fast.training.monitor import EXIT_HUNG, TrainingLog

from ..support.training import TINY, TOKENIZER, Halted, assert_same_bits, call, checkpoints, write_images

pytestmark = pytest.mark.slow
STEPS = 9  # 12 images, 4 a step, 3 epochs; a checkpoint every 3 steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, list]:
    """A run folder, and the options that made it; the images are read from their files in every step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = [*TINY, *TOKENIZER, "--no-in-memory", "--views", 0, "--log-every", 1]
    assert call("tokenizer", *options, "--data", write_images(folder / "images"), "--out", folder / "run") == 0
    return folder / "run", [*options, "--data", folder / "images"]


@pytest.fixture
def options(undisturbed, tmp_path) -> list:
    """Its options with images and a run folder of this test's own."""
    run, given = undisturbed
    shutil.copytree(run.parent / "images", tmp_path / "images")
    return [*given[:-1], tmp_path / "images", "--out", tmp_path / "run"]


def at_step(monkeypatch, step: int, action: Callable[[TrainingLog], None]) -> None:
    """Do something at the end of a step."""
    add = TrainingLog.add

    def wrapper(self, at, *args):
        add(self, at, *args)
        if at == step or step == 0:
            action(self)

    monkeypatch.setattr(TrainingLog, "add", wrapper)


def bad_losses(monkeypatch, steps: range, value: float) -> None:
    """The loss of these steps is multiplied by a value that is no finite number."""
    calls, loss = [0], tokenizer.TokenizerTask.loss

    def wrapper(self, model, batch):
        result, metrics = loss(self, model, batch)
        calls[0] += 1
        return (result * value if calls[0] in steps else result), metrics

    monkeypatch.setattr(tokenizer.TokenizerTask, "loss", wrapper)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_of_nan_or_inf_changes_neither_weights_nor_codebook_and_is_counted(
    options, tmp_path, monkeypatch, capsys, value
):
    states = []
    keep = lambda log: states.append({n: t.clone() for n, t in log.task.model.state_dict().items()})  # noqa: E731
    at_step(monkeypatch, 0, keep)
    bad_losses(monkeypatch, range(4, 6), value)
    assert call("tokenizer", *options) == 0
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(states)]
    assert changed == [step not in (4, 5) for step in range(2, STEPS + 1)]
    said = capsys.readouterr().out
    assert "step 4 skipped: the loss is" in said and "(2 in a row, 2 in all)" in said
    about = json.loads((tmp_path / "run" / "checkpoints" / "step_00000009" / "training.json").read_text())
    assert about["skipped_steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 6, 7, 8, 9]


def test_bad_steps_in_a_row_end_the_run_keep_the_last_good_checkpoint_and_write_the_batch(
    undisturbed, options, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        bad_losses(patch, range(5, 100), float("nan"))
        assert call("tokenizer", *options, "--stop-after-bad", 3) == 2
    said = capsys.readouterr().err
    assert "NaN or Inf in 3 steps in a row, the last being 7" in said and "the same command resumes" in said
    assert checkpoints(tmp_path / "run") == ["step_00000003"]  # none of step 6: the weights were suspect
    (file,) = (tmp_path / "run").glob("bad_batch_*")
    assert file.name == "bad_batch_step_00000005_rank_0.safetensors" and str(file) in said
    with safe_open(file, "pt") as batch:
        names = json.loads(batch.metadata()["images"])
        assert batch.get_tensor("image").shape == (4, 3, 128, 128)
        assert names == [f"{i:02d}.png" for i in batch.get_tensor("index").tolist()]
    assert call("tokenizer", *options) == 0
    assert_same_bits(tmp_path / "run", undisturbed[0])


def test_a_run_whose_last_steps_are_bad_does_not_end_as_if_it_were_good(options, tmp_path, monkeypatch, capsys):
    bad_losses(monkeypatch, range(STEPS, 100), float("nan"))
    assert call("tokenizer", *options) == 2
    assert "NaN or Inf in 1 steps in a row" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == ["step_00000003", "step_00000006"]


def test_a_hang_ends_with_a_stack_trace(options, tmp_path):
    training = Halted("tokenizer", 2, *options, "--hang-after", 4)  # it waits for a line that does not come
    training.output += training.process.stdout.read()
    training.watchdog.cancel()
    assert training.process.wait() == EXIT_HUNG
    trace = (tmp_path / "run" / "hang_rank_0.txt").read_text()
    for text in (trace, training.output):
        assert "no step in 4 seconds" in text and "halting.py" in text and "in add_and_halt" in text
    training.process.stdin.close()


def test_codebook_collapse_is_reported_with_what_to_try(options, capsys):
    assert call("tokenizer", *options, "--collapse-below", 1, "--collapse-after", 6, "--num-codes", 512) == 0
    assert capsys.readouterr().out.count("warning: codebook collapse: in the last lines of the log, 6 steps") == 1


def test_collapse_counts_steps_in_a_row_and_warns_again_after_as_many():
    watch = CollapseWatch(0.1, 40)
    warned = [watch.look(used, 20) is not None for used in (0.05, 0.5, 0.05, 0.05, 0.05, 0.05, 0.2)]
    assert warned == [False, False, False, True, False, True, False]
    assert "--lr" in CollapseWatch(0.1, 1).look(0.0, 1)


@pytest.mark.parametrize("jump", [-1e8, 1e8])
def test_a_clock_that_jumps_changes_nothing(undisturbed, options, tmp_path, monkeypatch, jump):
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    at_step(monkeypatch, 4, lambda log: offset.__setitem__(0, jump))
    assert call("tokenizer", *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["images_per_second"] < 1e5 for line in lines)
    assert_same_bits(tmp_path / "run", undisturbed[0])


@pytest.mark.parametrize("fault", ["vanish", "become junk"])
def test_files_that_vanish_or_become_junk_end_the_run_which_then_resumes_to_the_same_bits(
    undisturbed, options, tmp_path, monkeypatch, capsys, fault
):
    def spoil(log: TrainingLog) -> None:
        for file in (tmp_path / "images").iterdir():
            stat = file.stat()
            file.unlink() if fault == "vanish" else file.write_bytes(b"junk")
            if fault != "vanish":
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with monkeypatch.context() as patch:
        at_step(patch, 4, spoil)
        assert call("tokenizer", *options) == 2
    said = capsys.readouterr().err
    assert "could be read when it was checked, but cannot be now" in said and "Traceback" not in said
    shutil.copytree(undisturbed[0].parent / "images", tmp_path / "images", dirs_exist_ok=True)
    assert call("tokenizer", *options) == 0
    assert "resumed at step 3" in capsys.readouterr().out
    assert_same_bits(tmp_path / "run", undisturbed[0])


def test_a_data_loading_process_that_is_killed_ends_the_run_which_then_resumes_to_the_same_bits(
    undisturbed, options, tmp_path
):
    training = Halted("tokenizer", 2, *options, "--workers", 2)
    for child in Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split():
        os.kill(int(child), 9)
    assert training.go_on() == 2, training.output
    assert "error: A process that loaded images died" in training.output and "use fewer --workers" in training.output
    assert call("tokenizer", *options) == 0
    assert_same_bits(tmp_path / "run", undisturbed[0])


class Harmful:
    """Unpickling it writes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "the code ran")


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", "code"), ("optimizer.safetensors", "code"), ("model.safetensors", "cut")]
)
def test_a_checkpoint_of_pickled_code_or_cut_short_is_refused_and_the_one_before_is_used(
    undisturbed, tmp_path, capsys, name, damage
):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000009" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        torch.save({"model": Harmful(tmp_path / "ran")}, file)
    assert call("tokenizer", *undisturbed[1], "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "step_00000009 cannot be used" in said and "resumed at step 6 of 9" in said
    assert not (tmp_path / "ran").exists()
    assert_same_bits(tmp_path / "run", undisturbed[0])


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_weights_of_pickled_code_are_refused_and_the_code_does_not_run(tmp_path, protocol):
    file = tmp_path / "weights.pth"
    if protocol == "torch":
        torch.save({"model": Harmful(tmp_path / "ran")}, file)
    else:
        file.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="no PyTorch file of plain tensors"):
        read_weights(file)
    assert not (tmp_path / "ran").exists()
