"""Segmentation on two ranks is that of one process with the same global batch, batch norm included, and resumes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from ..support.downstream import SMALL, results, write_scenes
from ..support.training import Halted, assert_same_bits, call, last_weights, run_jobs
from ..training.test_distributed import settings

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
# 9 steps of 4 images; 5 images to evaluate, so that one rank has more of them
COMMON = [*SMALL, "--weights", "none", "--log-every", 1, "--save-every", 3, "--multi-scale", "--scales", 0.5, 1]
ALONE = ("--dropout", 0)  # ranks drop other channels than one process does
# Sums over ranks in another order, and batch norm by another formula, over 9 steps of AdamW at a rate of 1e-3
LOSS, WEIGHT = 1e-5, 1e-5
# Batch norm takes this bias away again: its gradient is rounding noise, which AdamW scales up, and the loss is the same
WITHOUT_EFFECT = ("fpn1.0.bias", "decode_head.lateral_convs.0.bn.running_mean")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders: one (a process), torch, zero3, dropping (two ranks), torch_to_torch, torch_to_zero3
    (moved at step 6)."""
    root = tmp_path_factory.mktemp("segment_ranks")
    write_scenes(root / "data" / "train", 12)
    write_scenes(root / "data" / "val", 5, 1)

    def options(name: str, *more: object) -> list[object]:
        return [*COMMON, "--data", root / "data", "--out", root / name, *more]

    assert call("segment", *options("one", *ALONE)) == 0
    zero = {name: settings(name, root) for name in ("zero3",)}
    jobs: list[tuple[str, list]] = [("segment", options("dropping", "--batch-size", 2))]
    for name in ("torch", *zero):
        jobs.append(("segment", options(name, *ALONE, "--batch-size", 2, *zero.get(name, []))))
    for target in ("torch", "zero3"):
        moved = f"torch_to_{target}"
        jobs.append(("copy", [root / "torch", root / moved, 6]))
        jobs.append(("segment", options(moved, *ALONE, "--batch-size", 2, *zero.get(target, []))))
    run_jobs(root, jobs)
    return root


def losses(run: Path) -> list[float]:
    """By step; a resumed run repeats some, and the last counts."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return list({line["step"]: line["loss"] for line in lines}.values())


@pytest.mark.parametrize("name", ("torch", "zero3"))
def test_two_ranks_train_as_one_process_with_the_same_global_batch(runs, name):
    assert len(losses(runs / name)) == 9
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=LOSS)
    ours, wanted = last_weights(runs / name), last_weights(runs / "one")
    assert ours.keys() == wanted.keys()
    for key in wanted.keys() - set(WITHOUT_EFFECT):
        torch.testing.assert_close(
            ours[key], wanted[key], rtol=WEIGHT, atol=WEIGHT, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_both_ranks_have_the_same_statistics_of_batch_norm(runs):
    told = [(runs / "dropping" / f"told_by_rank_{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    hashes = [[json.loads(line)[1] for line in lines] for lines in told]
    assert len(set(hashes[0])) == 9 and hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ("torch", "zero3"))
def test_two_ranks_evaluate_as_one_process_whoever_has_more_images(runs, name):
    ours, wanted = results(runs / name), results(runs / "one")
    for kind in ("weights", "multi_scale"):
        assert ours[kind]["images"] == 5
        assert ours[kind]["miou"] == pytest.approx(
            wanted[kind]["miou"], abs=1e-3
        )  # a few pixels at the edge of two classes


def test_a_run_of_two_ranks_goes_on_with_the_same_bits_and_under_zero_3_the_same_numbers(runs):
    assert_same_bits(runs / "torch_to_torch", runs / "torch")
    assert losses(runs / "torch_to_zero3") == pytest.approx(losses(runs / "torch"), rel=LOSS)


def test_stopped_and_killed_it_ends_with_the_same_bits(runs, tmp_path):
    options = [*COMMON, *ALONE, "--data", runs / "data", "--out", tmp_path / "run"]
    for step, number, workers in ((2, signal.SIGTERM, 1), (4, signal.SIGKILL, 0)):
        training = Halted("segment", step, *options, "--workers", workers)
        training.process.send_signal(number)
        assert training.go_on() == (-number if number == signal.SIGKILL else 128 + number), training.output
        assert ("stopped at step 2, saved" in training.output) == (number == signal.SIGTERM)
    assert call("segment", *options) == 0
    assert_same_bits(tmp_path / "run", runs / "one")
    assert results(tmp_path / "run") == results(runs / "one")
