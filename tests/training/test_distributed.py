"""Two ranks train as one process does: the same losses, the same codebook, whatever shares the work among them.

One process that accumulates two micro-batches adds the same numbers in the same order as two ranks with one each, so
there the bits must agree. With one batch of twice the size, matrix products add in another order, and the weights
differ by some last bits; the codebook adds integers, in whatever order, so it follows the weights to the bit.
Offload is slow on the CPU: faults/test_offload.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beitv2_fast.runs.checkpoints import read_weights
from beitv2_fast.weights.build import load_run_model

from ..support.quantizers import assert_same
from ..support.training import (
    PRETRAIN,
    ROOT,
    TINY,
    TOKENIZER,
    assert_same_bits,
    call,
    last_weights,
    losses,
    run_jobs,
    write_images,
)

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
STEPS, HALF = 20, 10
COMMON = [*TINY, "--epochs", 4, "--log-every", 1, "--save-every", HALF]  # 20 images, 4 a step
OPTIONS = {"tokenizer": [*COMMON, *TOKENIZER], "pretrain": [*COMMON, *PRETRAIN]}
CONFIGS = ("zero1", "zero2", "zero3")
# (resumed after half of the steps: run, under)
MOVES = [("zero3", "zero1"), ("zero2", "torch"), ("micro", "zero3"), ("zero3", "one")]
# Gradients clipped by another formula and summed in flat buffers, over 20 steps of AdamW at a rate of 1e-3
LOSS, WEIGHT = 1e-5, 1e-5
# A code's numbers, at most 1, of weights that differ by that much less: two units in the last place, measured 1.2e-7
CODE = 2.5e-7
UNEVEN, UNEVEN_EPOCHS = 11, 3  # images of which no number of steps makes an epoch
STILL = ("--drop-path", 0, "--lr", 1e-20)  # so small that adding it changes no weight that is not 0

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
    root = tmp_path_factory.mktemp("ranks")
    uneven = ("--data", write_images(root / "uneven", UNEVEN), "--epochs", UNEVEN_EPOCHS, "--views", 0)
    variants = {"no_drop": ("--drop-path", 0), "still": STILL}
    return make_runs(root, CONFIGS, MOVES, variants, {"uneven": uneven})


def make_runs(
    root: Path,
    configs: Sequence[str],
    moves: Sequence[tuple[str, str]],
    variants: dict[str, tuple],
    tokenizers: dict[str, tuple],
) -> Folder:
    """The folder of a run by (stage, name): micro, one_VARIANT (one process); torch, configs, variants (two ranks, the
    variants and further tokenizers under torch); CONFIG_still (if that is a variant; like it of the tokenizer only);
    A_to_B (moved)."""
    data = ["--data", write_images(root / "images", STEPS)]
    given = {"tokenizer": data, "pretrain": [*data, "--tokenizer", root / "tokenizer_micro"]}
    zero = {name: settings(name, root) for name in configs}
    micro = ("--batch-size", 2, "--accumulate", 2)

    def folder(stage: str, name: str) -> Path:
        return root / f"{stage}_{name}"

    def options(stage: str, name: str, *more: object) -> list[object]:
        return [*OPTIONS[stage], *given[stage], "--out", folder(stage, name), *more]

    def variants_of(stage: str) -> list[tuple[str, tuple]]:
        return [(name, more) for name, more in variants.items() if stage == "tokenizer" or name != "still"]

    for stage in OPTIONS:
        assert call(stage, *options(stage, "micro", *micro)) == 0
        for name, more in variants_of(stage):
            assert call(stage, *options(stage, f"one_{name}", *more)) == 0
    jobs: list[tuple[str, list]] = []
    for stage in OPTIONS:
        for name in ("torch", *configs):
            jobs.append((stage, options(stage, name, "--batch-size", 2, *zero.get(name, []))))
            if "still" in variants and name in zero and stage == "tokenizer":
                jobs.append((stage, options(stage, f"{name}_still", "--batch-size", 2, *zero[name], *STILL)))
        for name, more in variants_of(stage):
            jobs.append((stage, options(stage, name, "--batch-size", 2, *more)))
        for name, more in tokenizers.items() if stage == "tokenizer" else ():
            jobs.append((stage, options(stage, name, "--batch-size", 2, *more)))
        for source, target in moves:
            moved = f"{source}_to_{target}"
            jobs.append(("copy", [folder(stage, source), folder(stage, moved), HALF]))
            if target != "one":
                jobs.append((stage, options(stage, moved, "--batch-size", 2, *zero.get(target, []))))
    run_jobs(root, jobs)
    for stage, (source, target) in product(OPTIONS, moves):
        if target == "one":
            assert call(stage, *options(stage, f"{source}_to_one", *micro)) == 0
    return folder


def quantizer_state(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in last_weights(run).items() if name.startswith("quantize.")}


@pytest.mark.parametrize("stage", OPTIONS)
def test_two_ranks_have_the_losses_of_one_process_with_the_same_global_batch(runs, stage):
    one, two = losses(runs(stage, "one_no_drop")), losses(runs(stage, "no_drop"))
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=LOSS)


def test_two_ranks_have_the_codebook_of_one_process_with_the_same_global_batch_up_to_its_weights(runs):
    assert_same_codes(runs("tokenizer", "no_drop"), runs("tokenizer", "one_no_drop"))


def test_where_no_weight_moves_two_ranks_codebook_has_the_bits_of_one_process_with_the_same_global_batch(runs):
    assert_same_state(runs("tokenizer", "still"), runs("tokenizer", "one_still"))
    assert len(set(hashes(runs("tokenizer", "still"))[0])) == STEPS  # it moved in every step


def told(run: Path) -> list[list]:
    """Of each rank what it told after each step: [step, hash of all its buffers, its images as [epoch, index]]."""
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(run.glob("told_by_rank_*"))]


def hashes(run: Path) -> list[list[str]]:
    return [[digest for _, digest, _ in rank] for rank in told(run)]


@pytest.mark.parametrize("name", ["torch", "no_drop", *CONFIGS])
@pytest.mark.parametrize("stage", OPTIONS)
def test_all_ranks_hold_the_same_codebook_and_buffers_in_every_step(runs, stage, name):
    first, second = hashes(runs(stage, name))
    assert first == second and len(first) == STEPS
    assert len(set(first)) == (STEPS if stage == "tokenizer" else 1)


def test_two_ranks_see_every_image_once_in_every_epoch(runs):
    ranks = told(runs("tokenizer", "uneven"))
    seen = [(epoch, image) for rank in ranks for _, _, images in rank for epoch, image in images]
    whole = [(epoch, image) for epoch in range(UNEVEN_EPOCHS) for image in range(UNEVEN)]
    assert sorted(key for key in seen if key[0] < UNEVEN_EPOCHS) == whole
    assert len(seen) - len(whole) < 4  # images of the next epoch fill the last step


@pytest.mark.parametrize("stage", OPTIONS)
def test_two_ranks_have_the_bits_of_one_process_with_two_micro_batches(runs, stage):
    assert losses(runs(stage, "torch")) == losses(runs(stage, "micro"))
    assert_same_bits(runs(stage, "torch"), runs(stage, "micro"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", OPTIONS)
def test_every_zero_stage_trains_as_torch_does(runs, stage, name):
    assert losses(runs(stage, name)) == pytest.approx(losses(runs(stage, "torch")), rel=LOSS)
    assert_close_weights(runs(stage, name), runs(stage, "torch"))


@pytest.mark.parametrize("name", CONFIGS)
def test_under_every_zero_stage_all_vectors_choose_the_codes_of_one_process(runs, name):
    assert_same_codes(runs("tokenizer", name), runs("tokenizer", "micro"))


@pytest.mark.parametrize("name", CONFIGS)
def test_under_every_zero_stage_the_codebook_has_one_process_s_bits_where_no_weight_moves(runs, name):
    assert_same_state(runs("tokenizer", f"{name}_still"), runs("tokenizer", "one_still"))


@pytest.mark.parametrize("move", [f"{a}_to_{b}" for a, b in MOVES])
@pytest.mark.parametrize("stage", OPTIONS)
def test_a_checkpoint_moves_between_world_sizes_zero_stages_and_torch(runs, stage, move):
    assert_moved(runs(stage, move), runs(stage, "micro"))


def assert_moved(run: Path, whole: Path) -> None:
    assert f"resumed at step {HALF} of {STEPS}" in (run / "log.txt").read_text()
    assert_close_weights(run, whole)  # the moments have survived too, or AdamW's steps would differ by the rate, 1e-3
    assert_same_codes(run, whole)


def assert_close_weights(run: Path, other: Path) -> None:
    ours, others = last_weights(run), last_weights(other)
    assert ours.keys() == others.keys()
    for weight in ours:
        assert torch.allclose(ours[weight].double(), others[weight].double(), rtol=0, atol=WEIGHT), weight


def assert_same_codes(run: Path, other: Path) -> None:
    """All vectors chose the same codes: the statistics have the same bits. What the codes became differs as little as
    the weights do."""
    ours, others = quantizer_state(run), quantizer_state(other)
    if ours or others:  # a student has none
        assert torch.allclose(ours.pop("quantize.codebook"), others.pop("quantize.codebook"), rtol=0, atol=CODE)
        assert "quantize.cluster_size" in ours and "quantize.idle" in ours
    assert_same(ours, others)


def assert_same_state(run: Path, other: Path) -> None:
    """The codebook and its statistics have the same bits."""
    ours = quantizer_state(run)
    assert "quantize.codebook" in ours
    assert_same(ours, quantizer_state(other))


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


def test_another_number_of_images_per_step_is_refused(runs, tmp_path, capsys):
    run = runs("tokenizer", "micro")
    before = read_weights(run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")
    options = [*OPTIONS["tokenizer"], "--data", run.parent / "images", "--out", run, "--batch-size", 2]
    assert call("tokenizer", *options) == 2
    assert "was trained with 4 images per step, these options give 2" in capsys.readouterr().err
    after = read_weights(run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
