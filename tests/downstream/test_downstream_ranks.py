"""Fine-tuning, probes and evaluation on two ranks: as one process with the same global batch, also under ZeRO 2, also
killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beitv2_fast.downstream.probes.features import Extractor

from ..faults.test_ranks import ranks_of
from ..support.downstream import EVALUATE, results, write_colors
from ..support.training import (
    TINY,
    TORCHRUN,
    Halted,
    assert_resumed,
    assert_same_bits,
    call,
    last_weights,
    run,
    run_jobs,
)
from ..training.test_distributed import settings
from .test_finetune import PLAIN

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
STEPS, HALF = 12, 6  # 12 images, 4 a step
TUNE = [*TINY, "--epochs", 4, "--log-every", 1, "--save-every", HALF, "--eval-every", 2]
PROBE = "--preset demo --device cpu --workers 0 --epochs 3 --shots 1 --seeds 1 --no-exact --batch-size 4".split()
# Flat buffers and gradients of halves of the batch are added in another order, over 12 steps of AdamW at 1e-3
LOSS, WEIGHT = 1e-5, 1e-5


@pytest.fixture(scope="module")
def runs(starts, tmp_path_factory) -> Path:
    """micro and one: of one process; two, plain, zero2, their resumed copies, probes, evaluations: of two ranks."""
    root = shutil.copytree(starts, tmp_path_factory.mktemp("ranks") / "runs")
    write_colors(root / "data" / "train", 4)
    write_colors(root / "data" / "val", 3)  # 9 images: the ranks have 5 and 4
    write_colors(root / "some", 2, ("green", "red"))
    zero2 = settings("zero2", root)

    def tune(out: str, *more: object) -> list[object]:
        return [*TUNE, "--data", root / "data", "--weights", root / "pretrain", "--out", root / out, *more]

    def probe(out: str, *more: object) -> list[object]:
        return [*PROBE, "--data", root / "data", "--run", root / "pretrain", "--out", root / out, *more]

    def evaluate(out: str) -> list[object]:
        folders = root / "data" / "val", root / "some"
        return ["--model", root / "micro", "--data", *folders, "--out", root / out, *EVALUATE, "--batch-size", 4]

    random = ("--drop-path", 0.2)
    assert call("finetune", *tune("micro", *random, "--batch-size", 2, "--accumulate", 2)) == 0
    assert call("finetune", *tune("one", *PLAIN)) == 0
    assert call("evaluate", *evaluate("evaluated_by_one")) == 0
    assert call("linear_probe", *probe("probed_by_one")) == 0
    assert call("linear_probe", *probe("attended_by_one", "--protocol", "attentive")) == 0
    jobs = [("finetune", tune("two", *random, "--batch-size", 2))]
    jobs.append(("finetune", tune("plain", *PLAIN, "--batch-size", 2)))
    jobs.append(("finetune", tune("zero2", *random, "--batch-size", 2, *zero2)))
    for name, more in (("two", ()), ("zero2", zero2)):
        jobs.append(("copy", [root / name, root / f"{name}_resumed", HALF]))
        jobs.append(("finetune", tune(f"{name}_resumed", *random, "--batch-size", 2, *more)))
    jobs.append(("evaluate", evaluate("evaluated_by_two")))
    jobs.append(("linear_probe", probe("attended_by_two", "--protocol", "attentive", "--batch-size", 2)))
    jobs.append(("linear_probe", probe("probed_by_two")))  # the last: its ranks part
    run_jobs(root, jobs)
    return root


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def average(run_folder: Path) -> dict[str, torch.Tensor]:
    return last_weights(run_folder, "ema")


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name].double(), two[name].double(), rtol=0, atol=WEIGHT)


def test_two_ranks_have_the_losses_of_one_process_with_the_same_global_batch(runs):
    one, two = ([line["loss"] for line in lines(runs / name / "metrics.jsonl")] for name in ("one", "plain"))
    assert len(one) == STEPS and len(set(one)) == STEPS
    assert two == pytest.approx(one, rel=LOSS)
    assert_close(last_weights(runs / "plain"), last_weights(runs / "one"))
    assert_close(average(runs / "plain"), average(runs / "one"))


def test_two_ranks_have_the_bits_of_one_process_with_two_micro_batches_mixing_erasing_and_drop_path_included(runs):
    assert_same_bits(runs / "two", runs / "micro")
    assert [line["loss"] for line in lines(runs / "two" / "metrics.jsonl")] == [
        line["loss"] for line in lines(runs / "micro" / "metrics.jsonl")
    ]


def test_zero_2_trains_and_averages_as_torch_does(runs):
    assert "DeepSpeed ZeRO 2" in (runs / "zero2" / "log.txt").read_text()
    assert_close(last_weights(runs / "zero2"), last_weights(runs / "two"))
    assert_close(average(runs / "zero2"), average(runs / "two"))


def test_two_ranks_evaluate_every_image_once(runs):
    one, two = (lines(runs / name / "evaluation.jsonl") for name in ("micro", "two"))
    assert [line["weights_images"] for line in two] == [9, 9]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ["two", "zero2"])
def test_resumed_in_the_middle_two_ranks_end_with_the_same_bits_of_weights_and_average(runs, name):
    assert_resumed(runs / f"{name}_resumed", runs / name, HALF)


def test_two_ranks_under_zero_2_that_are_killed_resume_to_the_same_bits(runs, tmp_path):
    options = [*TUNE, "--data", runs / "data", "--weights", runs / "pretrain", "--out", tmp_path / "run"]
    options += ["--drop-path", 0.2, "--batch-size", 2, *settings("zero2", tmp_path)]
    training = Halted("finetune", HALF + 2, *options, launcher=TORCHRUN)
    for pid in ranks_of(training.pid).values():  # not the launcher: ranks would save when it dies
        os.kill(pid, signal.SIGKILL)
    assert training.go_on() != 0
    done = run("finetune", *options, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_resumed(tmp_path / "run", runs / "zero2", HALF)


def test_two_ranks_evaluate_a_classifier_on_several_folders_as_one_process_does(runs):
    one, two = results(runs / "evaluated_by_one")["rows"], results(runs / "evaluated_by_two")["rows"]
    assert [(row["folder"], row["images"]) for row in two[::2]] == [("val", 9), ("some", 4)]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == {**theirs, "loss": pytest.approx(theirs["loss"], rel=1e-5)}


def test_two_ranks_share_the_features_of_a_probe_and_rank_0_finds_what_one_process_finds(runs):
    one, two = results(runs / "probed_by_one"), results(runs / "probed_by_two")
    assert two == one
    files = [sorted((runs / name / "features").iterdir()) for name in ("probed_by_one", "probed_by_two")]
    assert len(files[0]) == 2 and [file.name for file in files[0]] == [file.name for file in files[1]]
    for ours, theirs in zip(*files, strict=True):
        torch.testing.assert_close(load_file(ours)["features"], load_file(theirs)["features"], rtol=1e-5, atol=1e-6)


def test_two_ranks_train_a_probe_as_one_process_with_the_same_global_batch(runs):
    assert_close(last_weights(runs / "attended_by_two"), last_weights(runs / "attended_by_one"))
    one, two = (results(runs / name)["rows"][0] for name in ("attended_by_one", "attended_by_two"))
    assert two == {**one, "loss": pytest.approx(one["loss"], rel=1e-5)}


def test_a_resumed_probe_reads_the_features_that_the_ranks_left(runs, monkeypatch):
    shutil.copytree(runs / "probed_by_two", runs / "probed_again")
    (runs / "probed_again" / "results.json").unlink()
    options = ["--data", runs / "data", "--run", runs / "pretrain", "--out", runs / "probed_again"]
    monkeypatch.setattr(Extractor, "_computed", lambda *_: pytest.fail("computed again"))
    assert call("linear_probe", *PROBE, *options) == 0
    assert results(runs / "probed_again") == results(runs / "probed_by_two")
