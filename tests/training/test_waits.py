"""A training step waits for no device: what it came to the host learns in the next step, with nothing else changed.

Shown on the CPU, told to behave as a device that has to be waited for; tests/models/test_models_gpu.py asks CUDA.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.distributed import World
from beitv2_fast.models import vit as vit_module
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.train import finetune, pretrain, tokenizer
from beitv2_fast.training import loop, monitor
from beitv2_fast.training.monitor import TrainingLog, Undo
from beitv2_fast.training.optim import TorchBackend, parameter_groups
from beitv2_fast.training.task import Task

from ..support.dispatched import Dispatched
from ..support.downstream import write_colors
from ..support.small_runs import small_tokenizer
from ..support.training import PRETRAIN, TINY, TOKENIZER, assert_same_bits, call, checkpoints, write_images

WORLD = World(0, 1, torch.device("cpu"))
TASKS = {
    "tokenizer": tokenizer.TokenizerTask,
    "pretrain": pretrain.PretrainTask,
    "finetune": finetune.FinetuneTask,
}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, list]:
    """Of each stage, for nine steps."""
    folder = tmp_path_factory.mktemp("waits")
    images = write_images(folder / "images")
    write_colors(folder / "colors", 4)
    first = [*TINY, *TOKENIZER, "--data", images]
    return {
        "tokenizer": [*first, "--dead-after", 0.5],
        "pretrain": [*TINY, *PRETRAIN, "--data", images, "--tokenizer", small_tokenizer(folder / "tokenizer")],
        "finetune": [*TINY, "--data", folder / "colors", "--weights", "none", "--ema-decay", 0.9],
    }


def learn_late(monkeypatch) -> None:
    for module in (loop, monitor):
        monkeypatch.setattr(module, "learns_late", lambda device: True)


def poison(monkeypatch, stage: str, steps: tuple[int, ...]) -> None:
    calls, loss = [0], TASKS[stage].loss

    def poisoned(self: Task, *args):
        calls[0] += 1
        result, metrics = loss(self, *args)
        return (result * torch.nan if calls[0] in steps else result), metrics

    monkeypatch.setattr(TASKS[stage], "loss", poisoned)


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "time")} for line in found]


@pytest.mark.parametrize("bad", [(), (1, 5, 6)], ids=["all good", "some bad"])
@pytest.mark.parametrize("stage", TASKS)
def test_learning_late_of_its_steps_a_training_has_the_same_bits_and_log(options, stage, bad, tmp_path, monkeypatch):
    for name in ("at_once", "late"):
        with monkeypatch.context() as patch:
            poison(patch, stage, bad)
            if name == "late":
                learn_late(patch)
            assert call(stage, *options[stage], "--out", tmp_path / name) == 0
    assert checkpoints(tmp_path / "late") == checkpoints(tmp_path / "at_once")
    assert_same_bits(tmp_path / "late", tmp_path / "at_once")
    assert len(lines(tmp_path / "late")) >= 4 and lines(tmp_path / "late") == lines(tmp_path / "at_once")
    log = (tmp_path / "late" / "log.txt").read_text()
    assert [f"step {step} skipped: the loss is nan" in log for step in range(1, 10)] == [s in bad for s in range(1, 10)]


def test_bad_steps_in_a_row_end_the_run_in_the_step_after_and_name_the_first_batch(
    options, tmp_path, monkeypatch, capsys
):
    learn_late(monkeypatch)
    poison(monkeypatch, "pretrain", tuple(range(4, 10)))
    assert call("pretrain", *options["pretrain"], "--out", tmp_path / "run", "--stop-after-bad", 2) == 2
    assert "NaN or Inf in 2 steps in a row, the last being 5" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    (file,) = (tmp_path / "run").glob("bad_batch_*")
    assert file.name == "bad_batch_step_00000004_rank_0.safetensors"


def test_in_a_step_that_logs_nothing_the_host_reads_no_tensor(options, tmp_path, monkeypatch):
    """From the log of step 4 of 9, which is told in step 5, to that of step 5. A tokenizer's codebook is read on the
    CPU and on a GPU not: tests/quantize and tests/models hold that."""
    stage = "pretrain"
    learn_late(monkeypatch)
    seen, add = Dispatched(), TrainingLog.add

    def add_and_watch(self, step, *args):
        add(self, step, *args)
        if step in (4, 5):
            seen.__enter__() if step == 4 else seen.__exit__(None, None, None)

    monkeypatch.setattr(TrainingLog, "add", add_and_watch)
    assert call(stage, *options[stage], "--out", tmp_path / "run", "--save-every", 100, "--log-every", 100) == 0
    assert seen.counts["aten::_fused_adamw_"] and not seen.reads


def test_a_bad_step_is_undone_without_the_host(monkeypatch):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    config = PretrainConfig(clip_grad=1.0)
    backend, undo = TorchBackend(model, parameter_groups(model, 0.05), config, WORLD), Undo(model)
    for factor in (1.0, torch.nan, 1.0):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        steps = [backend.optimizer.state[p]["step"].item() for p in model.parameters() if backend.optimizer.state]
        with Dispatched() as seen:
            undo.keep()
            backend.backward(monitor.poisoned(model(torch.randn(4, 3)).square().sum() * factor), last=True)
            undo.back(backend.step(1e-2))
        assert not seen.reads
        unchanged = {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()}
        assert all(unchanged.values()) if factor != 1 else not any(unchanged.values())
        if factor != 1:
            assert [backend.optimizer.state[p]["step"].item() for p in model.parameters()] == steps


# A 12-layer step with the ops that a GPU would get: launches, of which a custom op may make several. A bound is what
# was counted when it was written.
LAUNCHES = {"pre-training": 1718, "tokenizer": 1043, "quantizer": 10}


def launches_of_a_step(task: Task, batch: dict[str, torch.Tensor], config) -> int:
    task.model.train()
    backend, undo = TorchBackend(task.model, parameter_groups(task.model, 0.05), config, WORLD), Undo(task.model)
    for step in range(3):  # first the codebook starts, and the optimizer makes its state
        with Dispatched() as seen:
            undo.keep()
            loop.gradient(task, backend, batch, config, step, WORLD, torch.bfloat16)
            undo.back(backend.step(1e-3))
    return seen.launches


def test_launches_of_a_step_do_not_creep_up(monkeypatch):
    monkeypatch.setattr(vit_module, "FAST_BF16", True)  # no operand is widened, as on a GPU
    shape = ViTConfig(image_size=32, patch_size=8, dim=16, heads=2, drop_path=0.1, layer_scale=0.1, attention="sdpa")
    encoder = replace(shape, position="absolute", layer_scale=0.0, drop_path=0.0)
    images = torch.rand(4, 3, 32, 32)
    found = {}
    student = Student(StudentConfig(shape, num_codes=64))
    coder = Tokenizer(TokenizerModelConfig(encoder, num_codes=64, code_dim=8)).frozen(torch.bfloat16)
    config = PretrainConfig(batch_size=4, num_masked=6, min_mask_patches=2)
    mask = torch.arange(16).expand(4, -1) < 6
    batch = {"student": images, "tokenizer": images, "mask": mask}
    found["pre-training"] = launches_of_a_step(pretrain.PretrainTask(student, coder, config), batch, config)
    model = Tokenizer(TokenizerModelConfig(encoder, num_codes=64, code_dim=8))
    config = TokenizerConfig(batch_size=4)
    target = torch.randn(4, 16, 512)
    task = tokenizer.TokenizerTask(model, lambda images, grid: target, config)
    found["tokenizer"] = launches_of_a_step(task, {"image": images}, config)
    quantizer, vectors = FusedVectorQuantizer(64, 8), torch.randn(4, 16, 8, requires_grad=True)
    for _ in range(2):
        with Dispatched() as seen:
            quantizer(vectors).loss.backward()
    found["quantizer"] = seen.launches
    assert all(found[name] <= most for name, most in LAUNCHES.items()), found
