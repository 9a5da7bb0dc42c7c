"""Two ranks train as one process does: the same losses, the same codebook, whatever shares the work among them.

One process that accumulates two micro-batches adds the same numbers in the same order as two ranks with one each, so
there the bits must agree. With one batch of twice the size, matrix products add in another order.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beitv2_fast.build import load_run_model
from beitv2_fast.checkpoint import read_weights

from .training import (
    ENVIRONMENT,
    PRETRAIN,
    ROOT,
    TINY,
    TOKENIZER,
    assert_same_bits,
    call,
    last_weights,
    write_images,
)

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
STEPS, HALF = 20, 10
COMMON = [*TINY, "--epochs", 4, "--log-every", 1, "--save-every", HALF]  # 20 images, 4 a step
OPTIONS = {"tokenizer": [*COMMON, *TOKENIZER], "pretrain": [*COMMON, *PRETRAIN]}
CONFIGS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# (resumed after half of the steps: run, under)
MOVES = [("zero3", "zero1"), ("zero2", "torch"), ("micro", "zero3"), ("zero1", "zero2_offload")]
# Gradients clipped by another formula and summed in flat buffers, over 20 steps of AdamW at a rate of 1e-3
LOSS, WEIGHT = 1e-5, 1e-5

Folder = Callable[[str, str], Path]


def settings(name: str, folder: Path) -> list[object]:
    """The options for a file of train/configs; under ZeRO 3 even the smallest parameter is spread over the ranks."""
    content = json.loads((ROOT / "train" / "configs" / f"{name}.json").read_text())
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / f"{name}.json").write_text(json.dumps(content))
    return ["--deepspeed-config", folder / f"{name}.json"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Folder:
    """The folder of a run by (stage, name): one, micro (one process); torch and CONFIGS (two ranks); A_to_B (moved)."""
    root = tmp_path_factory.mktemp("ranks")
    data = ["--data", write_images(root / "images", STEPS)]
    given = {"tokenizer": data, "pretrain": [*data, "--tokenizer", root / "tokenizer_micro"]}
    zero = {name: settings(name, root) for name in CONFIGS}

    def folder(stage: str, name: str) -> Path:
        return root / f"{stage}_{name}"

    def options(stage: str, name: str, *more: object) -> list[str]:
        return list(map(str, [*OPTIONS[stage], *given[stage], "--out", folder(stage, name), *more]))

    micro = ("--batch-size", 2, "--accumulate", 2)
    for stage in OPTIONS:
        assert call(stage, *options(stage, "micro", *micro)) == 0
        assert call(stage, *options(stage, "one", "--drop-path", 0)) == 0
    jobs: list[tuple[str, list]] = []
    for stage in OPTIONS:
        for name in ("torch", *CONFIGS):
            jobs.append((stage, options(stage, name, "--batch-size", 2, *zero.get(name, []))))
        jobs.append((stage, options(stage, "no_drop", "--batch-size", 2, "--drop-path", 0)))
        for source, target in MOVES:
            moved = f"{source}_to_{target}"
            jobs.append(("copy", [str(folder(stage, source)), str(folder(stage, moved)), HALF]))
            jobs.append((stage, options(stage, moved, "--batch-size", 2, *zero.get(target, []))))
        jobs.append(("copy", [str(folder(stage, "zero3")), str(folder(stage, "zero3_to_one")), HALF]))
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "ranks.py"), str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-5000:]
    for stage in OPTIONS:
        assert call(stage, *options(stage, "zero3_to_one", *micro)) == 0
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", OPTIONS)
def test_two_ranks_have_the_losses_of_one_process_with_the_same_global_batch(runs, stage):
    one, two = losses(runs(stage, "one")), losses(runs(stage, "no_drop"))
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=LOSS)


@pytest.mark.parametrize("stage", OPTIONS)
def test_two_ranks_have_the_bits_of_one_process_with_two_micro_batches(runs, stage):
    assert losses(runs(stage, "torch")) == losses(runs(stage, "micro"))
    assert_same_bits(runs(stage, "torch"), runs(stage, "micro"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", OPTIONS)
def test_every_zero_stage_trains_as_torch_does(runs, stage, name):
    assert losses(runs(stage, name)) == pytest.approx(losses(runs(stage, "torch")), rel=LOSS)
    ours, torchs = last_weights(runs(stage, name)), last_weights(runs(stage, "torch"))
    assert ours.keys() == torchs.keys()
    for weight in ours:
        assert torch.allclose(ours[weight].double(), torchs[weight].double(), rtol=0, atol=WEIGHT), weight


@pytest.mark.parametrize("name", ["torch", *CONFIGS])
def test_the_codebook_and_its_statistics_have_one_process_s_bits(runs, name):
    ours, one = last_weights(runs("tokenizer", name)), last_weights(runs("tokenizer", "micro"))
    state = [weight for weight in one if weight.startswith("quantize.")]
    assert "quantize.codebook" in state and len(state) > 3
    assert [weight for weight in state if not torch.equal(ours[weight], one[weight])] == []


@pytest.mark.parametrize("move", [f"{a}_to_{b}" for a, b in MOVES] + ["zero3_to_one"])
@pytest.mark.parametrize("stage", OPTIONS)
def test_a_checkpoint_moves_between_world_sizes_zero_stages_and_torch(runs, stage, move):
    log = (runs(stage, move) / "log.txt").read_text()
    assert f"resumed at step {HALF} of {STEPS}" in log
    ours, whole = last_weights(runs(stage, move)), last_weights(runs(stage, "micro"))
    for weight in whole:  # the optimiser's moments have survived too, or AdamW's steps would differ by the rate, 1e-3
        assert torch.allclose(ours[weight].double(), whole[weight].double(), rtol=0, atol=WEIGHT), weight
    if stage == "tokenizer":
        assert torch.equal(ours["quantize.codebook"], whole["quantize.codebook"])


@pytest.mark.parametrize("stage", OPTIONS)
def test_a_zero_3_checkpoint_is_one_safetensors_file_that_the_plain_model_loads(runs, stage):
    run = runs(stage, "zero3")
    file = run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors"
    model, _ = load_run_model(run)
    stored = load_file(file)
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    if stage == "tokenizer":
        assert stored["quantize.codebook"].norm(dim=1).allclose(torch.ones(16))  # neither lost nor zeros


def test_another_number_of_images_a_step_is_refused(runs, tmp_path, capsys):
    run = runs("tokenizer", "micro")
    before = read_weights(run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")
    options = [*OPTIONS["tokenizer"], "--data", run.parent / "images", "--out", run, "--batch-size", 2]
    assert call("tokenizer", *options) == 2
    assert "was trained with 4 images a step, these options give 2" in capsys.readouterr().err
    after = read_weights(run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
