"""fp16 on hardware without bf16: the loss scale falls by a step that overflows, which is nobody's bad step."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.distributed import World, autocast_dtype
from beitv2_fast.train import pretrain
from beitv2_fast.training import loop, monitor, optim
from beitv2_fast.training.monitor import BadSteps
from beitv2_fast.training.optim import LossScale, TorchBackend, parameter_groups

from ..support.dispatched import Dispatched
from ..support.small_runs import small_tokenizer
from ..support.training import (
    PRETRAIN,
    TINY,
    assert_resumes_to_the_same_bits,
    assert_same_bits,
    call,
    last_weights,
    write_images,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_is_fp16_on_gpus_that_multiply_no_bf16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype("auto", torch.device("cuda", 0)) == dtype
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert autocast_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16


def test_the_scale_is_that_of_torch_s_gradscaler_after_every_step(monkeypatch):
    monkeypatch.setattr(optim, "GROWS_AFTER", 3)
    ours, theirs = LossScale("fp16", CPU), torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    for finite in "1 1 1 1 0 1 1 0 0 1 1 1 1 1 1 1".split():
        theirs.scale(parameter.sum()).backward()
        parameter.grad *= 1.0 if finite == "1" else torch.inf
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(finite == "1"))
        state = theirs.state_dict()
        assert ours.state.tolist() == [state["scale"], state["_growth_tracker"]]
    assert not LossScale("bf16", CPU).numbers() and not LossScale("auto", CPU).saved()


def test_a_scaled_step_has_the_bits_of_one_that_is_not_and_an_overflow_changes_nothing_but_the_scale():
    backends = {}
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        config = PretrainConfig(precision=precision, accumulate=2, clip_grad=0.5)
        world = World(0, 1, CPU)
        backends[precision] = TorchBackend(model, parameter_groups(model, 0.05), config, world)
    for factor in (1.0, 1e38, 1.0):
        inputs = torch.randn(2, 4, 3)
        before = {name: value.clone() for name, value in backends["fp16"].weights().items()}
        norms = {}
        for precision, backend in backends.items():
            if factor == 1 or precision == "fp16":
                with Dispatched() as seen:
                    for i, part in enumerate(inputs):
                        backend.backward(backend.wrapped(part).square().mean() * factor, last=i == 1)
                    norms[precision] = backend.step(1e-2)
                assert not seen.reads
        if factor == 1:
            assert norms["fp16"] == norms["fp32"] > 0.5
        else:
            assert not norms["fp16"].isfinite()
            assert all(torch.equal(before[name], value) for name, value in backends["fp16"].weights().items())
    states = [backend.optimizer_state() for backend in backends.values()]
    assert states[1].pop("loss_scale").tolist() == [2.0**15, 1]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
    for name, value in backends["fp32"].weights().items():
        assert torch.equal(value, backends["fp16"].weights()[name])


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list:
    """Pre-training in fp16, nine steps with a checkpoint at each third."""
    folder = tmp_path_factory.mktemp("fp16")
    given = ["--data", write_images(folder / "images"), "--tokenizer", small_tokenizer(folder / "tokenizer")]
    return [*TINY, *PRETRAIN, *given, "--precision", "fp16", "--log-every", 1, "--save-every", 3]


def scale_losses(monkeypatch, factors: dict[int, float]) -> None:
    """Of these steps of the next training."""
    step, loss = [0], pretrain.PretrainTask.loss

    def scaled(self, *args):
        step[0] += 1
        result, metrics = loss(self, *args)
        return result * factors.get(step[0], 1.0), metrics

    monkeypatch.setattr(pretrain.PretrainTask, "loss", scaled)


def scales(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_scale"]) for line in lines]


@pytest.fixture(scope="module")
def whole(options) -> Path:
    """Step 2 overflows: its finite loss has a gradient that fp16 does not hold."""
    out = options[options.index("--tokenizer") + 1].with_name("whole")
    with pytest.MonkeyPatch.context() as patch:
        scale_losses(patch, {2: 1e30})
        assert call("pretrain", *options, "--out", out) == 0
    return out


def test_an_overflow_halves_the_scale_and_counts_as_no_bad_step(whole):
    log = (whole / "log.txt").read_text()
    assert "fp16 autocast" in log
    assert "step 2 skipped: the gradient is beyond fp16 at a loss scale of 65,536, which is halved" in log
    assert "in all)" not in log
    about = json.loads(next((whole / "checkpoints").glob("step_00000009/training.json")).read_text())
    assert about["skipped_steps"] == 0
    assert scales(whole) == [(1, 65536), *((step, 32768) for step in range(3, 10))]
    state = last_weights(whole, "optimizer")
    assert state["loss_scale"].tolist() == [32768, 7] and state["step"] == 8


def test_fp16_resumes_to_the_same_bits_and_scale(options, whole):
    assert_resumes_to_the_same_bits(lambda out: call("pretrain", *options, "--out", out), whole)
    assert scales(whole.with_name("whole_resumed"))[-3:] == [(7, 32768), (8, 32768), (9, 32768)]


def test_where_the_host_learns_of_its_steps_late_an_overflow_has_the_same_bits_and_log(
    options, whole, tmp_path, monkeypatch
):
    for module in (loop, monitor):
        monkeypatch.setattr(module, "learns_late", lambda device: True)
    scale_losses(monkeypatch, {2: 1e30})
    assert call("pretrain", *options, "--out", tmp_path / "late") == 0
    assert_same_bits(tmp_path / "late", whole)
    assert scales(tmp_path / "late") == scales(whole)


@pytest.mark.parametrize(
    ("factor", "first"), [(torch.nan, 4), (1e30, 5)], ids=["a loss of NaN", "a gradient beyond fp16 at a scale of 1"]
)
def test_what_no_scale_mends_is_a_bad_step(options, tmp_path, monkeypatch, capsys, factor, first):
    monkeypatch.setattr(optim, "START_SCALE", 2.0)
    scale_losses(monkeypatch, dict.fromkeys(range(4, 10), factor))
    assert call("pretrain", *options, "--out", tmp_path / "run", "--stop-after-bad", 2) == 2
    said = f"NaN or Inf in 2 steps in a row, the last being {first + 1}"
    assert said in capsys.readouterr().err


def test_on_every_rank_a_loss_of_nan_of_another_rank_is_a_bad_step():
    class OfTwo(World):
        def any(self, flag: bool) -> bool:
            return True

    said: list[str] = []
    run = Mock(print=said.append)
    bad = BadSteps(run, OfTwo(1, 2, CPU), limit=10, skipped=0, paths=[])
    bad.bad(5, 0.5, torch.nan, {}, scale=65536.0)
    assert (bad.skipped, bad.in_a_row) == (1, 1) and "1 in a row" in said[0]
    bad = BadSteps(run, World(0, 1, CPU), limit=10, skipped=0, paths=[])
    bad.bad(5, 0.5, torch.nan, {}, scale=65536.0)
    assert (bad.skipped, bad.in_a_row) == (0, 0) and "beyond fp16" in said[1]
