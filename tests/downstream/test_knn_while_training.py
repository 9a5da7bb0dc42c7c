"""k nearest neighbors tell during a pre-training how good its features are, and change nothing about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from beitv2_fast.data.views import EvalView
from beitv2_fast.downstream.probes.features import global_features
from beitv2_fast.downstream.probes.knn import knn_predict
from beitv2_fast.downstream.probes.validation import KnnValidation
from beitv2_fast.models.student import Student
from beitv2_fast.show.report.stages import read_stage
from beitv2_fast.weights.build import load_run_model

from ..support.downstream import write_colors
from ..support.training import PRETRAIN, TINY, assert_same_bits, call


def pretrain(starts: Path, out: Path, *more: object) -> int:
    options = [*TINY, *PRETRAIN, "--data", starts / "images", "--tokenizer", starts / "tokenizer"]
    return call("pretrain", *options, "--out", out, *more)


def test_a_pre_training_tells_the_accuracy_of_neighbors_every_few_epochs_and_trains_the_same(starts, tmp_path):
    train, val = write_colors(tmp_path / "data" / "train", 5), write_colors(tmp_path / "data" / "val", 3)
    out = tmp_path / "out"
    assert pretrain(starts, out, "--knn-data", tmp_path / "data", "--knn-every", 2) == 0
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]  # of 2 steps per epoch, 3 epochs
    compute, view = global_features(load_run_model(out)[0]), EvalView(32, 1.0)

    def found(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        files = sorted(folder.rglob("*.png"))
        names = sorted({file.parent.name for file in files})
        images = torch.stack([view(Image.open(file).convert("RGB"))["image"] for file in files])
        return compute(images), torch.tensor([names.index(file.parent.name) for file in files])

    (x, labels), (queries, wanted) = found(train), found(val)
    for column, name in enumerate(("cls", "mean")):
        predicted = knn_predict(x[:, column], labels, queries[:, column], 3)
        for k in (10, 20):
            assert lines[-1][f"knn_{name}_{k}"] == pytest.approx((predicted[k] == wanted).double().mean().item())
    assert "10-NN  step 6  cls " in (out / "log.txt").read_text()
    assert read_stage(out, Student).evaluation == lines
    assert pretrain(starts, tmp_path / "without") == 0
    assert_same_bits(out, tmp_path / "without")


def test_the_weights_with_the_best_neighbors_are_kept(starts, tmp_path, monkeypatch):
    """Of the CLS token or of the mean; the third are only as good as the second."""
    for split, count in (("train", 5), ("val", 3)):
        write_colors(tmp_path / "data" / split, count)
    scores = iter([0.1, 0.3, 0.6, 0.2, 0.2, 0.6])
    monkeypatch.setattr(KnnValidation, "_top1", lambda *_: {10: next(scores), 20: 1.0})
    saving = ["--save-every", 2, "--keep-checkpoints", 3]
    out = tmp_path / "out"
    assert pretrain(starts, out, "--knn-data", tmp_path / "data", "--knn-every", 1, *saving) == 0
    best = load_file(out / "best" / "model.safetensors")
    at_4, at_6 = (load_file(out / "checkpoints" / f"step_0000000{s}" / "model.safetensors") for s in (4, 6))
    assert all(torch.equal(best[name], at_4[name]) for name in at_4)
    assert any(not torch.equal(best[name], at_6[name]) for name in at_6)


def test_neighbors_without_classes_are_refused(starts, tmp_path):
    assert pretrain(starts, tmp_path / "out", "--knn-data", starts / "images") == 2
