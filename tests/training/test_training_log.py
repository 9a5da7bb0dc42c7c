"""What the log of a training hands to its task, and what its lines are means of."""

from __future__ import annotations

import shlex
import sys

import pytest
import torch

from beitv2_fast.config.training import TrainConfig
from beitv2_fast.distributed import World
from beitv2_fast.runs.folder import RunFolder
from beitv2_fast.runs.logs import read_metrics, read_starts
from beitv2_fast.training.monitor import TrainingLog
from beitv2_fast.training.optim import Schedule


class Pictured:
    name = "pictured"

    def pictures(self, batch):
        self.batch = batch
        return {}


def test_pictures_are_made_of_one_image_on_the_device_that_trains(tmp_path):
    config = TrainConfig(out=tmp_path / "run", batch_size=4, epochs=1, log_every=100)
    task, world = Pictured(), World(0, 1, torch.device("meta"))
    with TrainingLog(task, RunFolder(config), world, Schedule.of(config, 8, 1), config, 0) as log:
        for step in (1, 2):
            assert not hasattr(task, "batch")  # only at the end of the epoch
            log.add(step, 1e-3, {}, {"image": torch.zeros(4, 3, 2, 2), "index": torch.arange(4)})
    assert {name: (value.device.type, len(value)) for name, value in task.batch.items()} == {
        "image": ("meta", 1),
        "index": ("meta", 1),
    }


class Counted(Pictured):
    def report(self):
        return {}

    def line(self, metrics):
        return ""

    def warning(self, metrics, steps):
        return None


@pytest.mark.parametrize(("start", "lines"), [(0, [20, 40, 60, 80, 101]), (39, [60, 80, 101]), (30, [40, 60, 80, 101])])
def test_a_window_of_a_few_steps_after_a_resume_or_at_the_end_is_no_line_of_its_own(tmp_path, capsys, start, lines):
    """Codes used in one step would look like a collapse."""
    config = TrainConfig(out=tmp_path / "run", batch_size=1, epochs=1, log_every=20)
    run, world = RunFolder(config), World(0, 1, torch.device("cpu"))
    with TrainingLog(Counted(), run, world, Schedule.of(config, 101, 1), config, start) as log:
        log.opening(101, 999_999, "fp32", "torch")
        for step in range(start + 1, 102):
            log.ask(step)
            log.add(step, 1e-3, {"loss": float(step)}, {"image": torch.zeros(1, 3, 2, 2)})
    found = read_metrics(tmp_path / "run")
    assert [line["step"] for line in found] == lines
    assert found[0]["loss"] == pytest.approx(sum(range(start + 1, lines[0] + 1)) / (lines[0] - start))
    assert "101 images, 1 epoch, 101 steps" in capsys.readouterr().out


def test_small_networks_have_a_number_of_parameters(tmp_path, capsys):
    config = TrainConfig(out=tmp_path / "run", batch_size=1, epochs=2)
    log = TrainingLog(
        Counted(), RunFolder(config), World(0, 1, torch.device("cpu")), Schedule.of(config, 4, 1), config, 0
    )
    log.opening(4, 12_345, "fp32", "torch")
    log.opening(4, 86_500_000, "fp32", "torch")
    first, second = capsys.readouterr().out.splitlines()
    assert "2 epochs" in first and " 12,345 parameters" in first and " 86.5 M parameters" in second


def test_a_run_s_log_begins_with_versions_machine_and_command(tmp_path):
    run = RunFolder(TrainConfig(out=tmp_path / "run"))
    run.print("something")
    (start,) = read_starts(run.path)
    assert start.what.startswith("beitv2-fast ") and f"torch {torch.__version__}" in start.what and " x " in start.what
    assert start.command == shlex.join(sys.orig_argv) and 0 <= start.minutes < 1


def test_the_minutes_of_a_stage_are_those_of_its_processes_and_not_what_lies_between(tmp_path):
    (tmp_path / "log.txt").write_text(
        "2026-01-01 10:00:00  of an earlier version\n"
        "2026-01-01 10:00:00  started by beitv2-fast 1 on 2 x CPU: python a.py --data 'x: y'\n"
        "2026-01-01 10:02:30  tokenizer: stopped\nits second line\n"
        "2026-01-02 09:00:00  started by beitv2-fast 2 on GPU: python a.py\n"
        "2026-01-02 09:01:00  tokenizer: done\n"
    )
    first, second = read_starts(tmp_path)
    assert (first.what, first.command, first.minutes) == ("beitv2-fast 1 on 2 x CPU", "python a.py --data 'x: y'", 2.5)
    assert (second.what, second.minutes) == ("beitv2-fast 2 on GPU", 1.0)
    assert read_starts(tmp_path / "nowhere") == []
