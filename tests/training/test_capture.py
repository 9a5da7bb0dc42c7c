"""A captured step trains to the bits of the eager one. Here its graph is a recording of ops on the CPU's tensors;
test_train_gpu.py has CUDA's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.distributed import World
from beitv2_fast.errors import UserError
from beitv2_fast.train.pretrain import PretrainTask
from beitv2_fast.training import launch
from beitv2_fast.training.capture import check_capture
from beitv2_fast.training.monitor import HostCopy
from beitv2_fast.training.optim import Schedule

from ..support.recorded_graph import RecordedGraph, pretend_graphs
from ..support.small_runs import small_tokenizer
from ..support.training import (
    PRETRAIN,
    TINY,
    TOKENIZER,
    assert_resumes_to_the_same_bits,
    assert_same_bits,
    call,
    spoil,
    write_images,
)
from .test_waits import learn_late, lines

CASES = [
    ("tokenizer", "--views 0 --dead-after 0.5"),
    ("tokenizer", "--views 1"),
    ("pretrain", "--precision bf16 --masks device"),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, list]:
    """Of each stage, for nine steps."""
    folder = tmp_path_factory.mktemp("capture")
    data = ["--data", write_images(folder / "images")]
    pretrain = [*TINY, *PRETRAIN, *data, "--tokenizer", small_tokenizer(folder / "tokenizer")]
    return {"tokenizer": [*TINY, *TOKENIZER, *data], "pretrain": pretrain}


@pytest.fixture
def graphs(monkeypatch) -> list[RecordedGraph]:
    """Steps may be captured here, the host learns of them late, and learning rates are numbers of fp32."""
    lr = Schedule.lr
    monkeypatch.setattr(Schedule, "lr", lambda self, step: float(np.float32(lr(self, step))))
    monkeypatch.setattr(launch, "check_capture", lambda *_: None)
    learn_late(monkeypatch)
    return pretend_graphs(monkeypatch)


@pytest.mark.parametrize(("stage", "more"), CASES)
def test_a_captured_training_has_the_bits_and_the_log_of_the_eager_one(
    options, graphs, stage, more, tmp_path, monkeypatch
):
    spoil(monkeypatch, (1, 7, 8))
    common = [*options[stage], *more.split()]
    assert call(stage, *common, "--out", tmp_path / "eager") == 0
    assert call(stage, *common, "--out", tmp_path / "captured", "--cuda-graph") == 0
    assert [graph.replays for graph in graphs] == [5]  # after three good steps, from the second on
    log = (tmp_path / "captured" / "log.txt").read_text()
    assert "torch, CUDA graph" in log and "step 8 skipped: the loss is nan" in log
    assert_same_bits(tmp_path / "captured", tmp_path / "eager")
    assert lines(tmp_path / "captured") == lines(tmp_path / "eager")


def test_a_captured_training_resumes_to_the_same_bits(options, graphs, tmp_path):
    common = [*options["pretrain"], "--cuda-graph", "--save-every", 5]
    assert call("pretrain", *common, "--out", tmp_path / "whole") == 0
    assert_resumes_to_the_same_bits(lambda out: call("pretrain", *common, "--out", out), tmp_path / "whole")
    assert [graph.replays for graph in graphs] == [6, 1]


def test_a_replay_is_on_its_way_before_the_host_asks_for_the_step_before(options, graphs, tmp_path, monkeypatch):
    events = []
    for owner, name in ((RecordedGraph, "replay"), (HostCopy, "read")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, name=name, do=original: (events.append(name), do(self))[1])
    rarely = ["--log-every", 100, "--save-every", 100]
    assert call("pretrain", *options["pretrain"], *rarely, "--cuda-graph", "--out", tmp_path / "run") == 0
    # Three warm-ups; after steps 3, 6 and 9, which end epochs, the host waits for pictures.
    assert events == ["read"] * 3 + ["replay", "replay", "read", "replay", "read", "read"] * 2


def test_what_cannot_be_captured_ends_with_a_word(options, graphs, tmp_path, monkeypatch, capsys):
    loss = PretrainTask.loss
    monkeypatch.setattr(PretrainTask, "loss", lambda *args: (found := loss(*args), found[0].item())[0])
    assert call("pretrain", *options["pretrain"], "--cuda-graph", "--out", tmp_path / "run") == 2
    assert "the step cannot be captured: the host reads a tensor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "world", "deepspeed", "changed"),
    [
        ("the device is the CPU", World(0, 1, torch.device("cpu")), False, {}),
        ("there are 2 processes", World(0, 2, torch.device("cuda")), False, {}),
        ("DeepSpeed trains", World(0, 1, torch.device("cuda")), True, {}),
        ("--accumulate is 2", World(0, 1, torch.device("cuda")), False, {"accumulate": 2}),
        ("--checkpointing keeps", World(0, 1, torch.device("cuda")), False, {"checkpointing": True}),
        ("--weight-decay-end changes", World(0, 1, torch.device("cuda")), False, {"weight_decay_end": 0.1}),
    ],
)
def test_where_a_step_cannot_be_captured_the_option_is_refused(said, world, deepspeed, changed):
    config = replace(PretrainConfig(), **changed)
    check_capture(config, world, deepspeed)  # without the option there is nothing to refuse
    with pytest.raises(UserError, match=f"captures the whole step of one process on a GPU, but {said}"):
        check_capture(replace(config, cuda_graph=True), world, deepspeed)
    check_capture(replace(PretrainConfig(), cuda_graph=True), World(0, 1, torch.device("cuda")), False)
