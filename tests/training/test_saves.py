"""When checkpoints are saved: by minutes, epochs or steps; the last two stay, and milestones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beitv2_fast.config.training import TrainConfig
from beitv2_fast.distributed import ONE, World
from beitv2_fast.training import loop, monitor
from beitv2_fast.training.loop import Saves
from beitv2_fast.training.monitor import OnAnyRank

from ..support.downstream import write_colors
from ..support.training import TINY, assert_same_bits, call, checkpoints

AT = TINY.index("--save-every")
OTHER = TINY[:AT] + TINY[AT + 2 :]  # without it; three steps are an epoch


def seconds_pass(monkeypatch, seconds: float) -> None:
    """Each look at the clock of checkpoints finds it so much later."""
    times = iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: seconds * next(times)))


def saved_at(config: TrainConfig, world: World = ONE, bad: tuple[int, ...] = ()) -> list[tuple[int, bool]]:
    """The steps of 12 after which there is a checkpoint, and whether it is a milestone; an epoch has three steps."""
    saves, found = Saves(config, world, 0), []
    for step in range(1, 13):
        if saves.due(step, 0 if step % 3 else step // 3, saves.time_has_come()) and step not in bad:
            found.append((step, saves.milestone))
            saves.done(step)
    return found


def test_minutes_are_those_of_rank_0_s_clock(monkeypatch):
    config = TrainConfig(save_every_minutes=1)
    seconds_pass(monkeypatch, 25)  # it is looked at in every step, and once more when time has come
    assert saved_at(config) == [(3, False), (6, False), (9, False), (12, False)]
    assert saved_at(config, World(1, 2, torch.device("cpu"))) == []
    assert saved_at(replace(config, save_every_minutes=0)) == []


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"save_every": 5}, [5, 10]),
        ({"save_every": 5, "save_every_epochs": 1}, [5, 10]),
        ({"save_every_epochs": 2}, [6, 12]),
        ({"save_every_minutes": 0}, []),
    ],
)
def test_steps_given_rule_else_epochs(monkeypatch, options, steps):
    if "save_every" in options:  # minutes do not count then
        seconds_pass(monkeypatch, 10**4)
    assert saved_at(TrainConfig(**options)) == [(step, False) for step in steps]


def test_milestones_are_saved_whatever_else_is_due_and_wait_for_a_good_step():
    config = TrainConfig(save_every=4, keep_every=2)
    assert saved_at(config) == [(4, False), (6, True), (8, False), (12, True)]
    assert saved_at(config, bad=(6, 8)) == [(4, False), (7, True), (9, False), (12, True)]


class Ranks(World):
    """Three ranks, of which the two others say ``others``, in the numbers that they send."""

    def sum(self, x):
        return x + self.others.pop(0)


@pytest.mark.parametrize("late", [False, True])
def test_ranks_hear_of_each_flag_by_itself_and_late_ones_a_step_later(monkeypatch, late):
    monkeypatch.setattr(monitor, "learns_late", lambda _: late)
    world = Ranks(0, 3, torch.device("cpu"))
    object.__setattr__(world, "others", [0, 2, 4, 8, 0])  # both stop; one says it is time; both do
    any_rank = OnAnyRank(world)
    flags = [(False, False), (True, False), (False, False), (True, True), (False, False)]
    found = [any_rank(*flag) for flag in flags]
    wanted = [[False, False], [True, False], [False, True], [True, True], [False, False]]
    assert found == ([[False, False], *wanted[:-1]] if late else wanted)


def train(tmp_path: Path, out: str, *more: object) -> int:
    """A fine-tuning on 12 images, three steps an epoch."""
    if not (tmp_path / "data").exists():
        write_colors(tmp_path / "data", 4)
    options = [*OTHER, "--weights", "none", "--ema-decay", 0.9, "--drop-path", 0.1, "--data", tmp_path / "data"]
    return call("finetune", *options, *more, "--out", tmp_path / out)


def test_the_last_and_the_milestones_stay_and_a_resumed_run_ends_with_the_same_bits_and_checkpoints(tmp_path):
    options = ["--epochs", 5, "--save-every-epochs", 1, "--keep-every", 2, "--keep-checkpoints", 1]
    assert train(tmp_path, "whole", *options) == 0
    names = ["step_00000006", "step_00000012", "step_00000015"]
    assert checkpoints(tmp_path / "whole") == names
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in names[1:]:
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / name)
    assert train(tmp_path, "resumed", *options) == 0
    assert checkpoints(tmp_path / "resumed") == names
    assert_same_bits(tmp_path / "resumed", tmp_path / "whole")


def test_by_the_clock_a_training_saves_when_time_has_come(tmp_path, monkeypatch):
    seconds_pass(monkeypatch, 25)
    assert train(tmp_path, "run", "--save-every-minutes", 1, "--keep-checkpoints", 9, "--epochs", 2) == 0
    assert checkpoints(tmp_path / "run") == ["step_00000003", "step_00000006"]
