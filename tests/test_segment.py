"""Segmentation from students, tokenizers and random weights: it learns, resumes to the same bits, is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast.build import load_run_model
from beitv2_fast.config import parse
from beitv2_fast.segmentation.config import SEGMENT, SegmentConfig
from beitv2_fast.segmentation.task import load_segmenter, start_segmenter
from beitv2_fast.transforms import normalise

from .training import PRETRAIN, TINY, TOKENIZER, assert_same_bits, call, checkpoints, write_images

COLOURS = np.array([(20, 40, 220), (30, 200, 40), (220, 30, 30)])
SMALL = [*TINY, "--channels", 16, "--auxiliary-channels", 8, "--ignore-labels", 7, "--base-size", 40, "--overlays", 2]
PLAIN = ["--no-distortion", "--scale-range", 1, 1, "--dropout", 0]


def write_scenes(folder: Path, count: int, seed: int = 0) -> Path:
    """Noisy images 48x40 of three rectangles of one colour a class, a border of void (7)."""
    draw = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        labels = np.full((40, 48), draw.integers(3), np.uint8)
        labels[: draw.integers(10, 30), : draw.integers(10, 40)] = draw.integers(3)
        labels[draw.integers(10, 30) :, draw.integers(10, 40) :] = draw.integers(3)
        pixels = (COLOURS[labels] + draw.integers(-20, 21, (40, 48, 3))).clip(0, 255).astype(np.uint8)
        labels[:, :1] = 7
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with data/train and data/val of three classes, a tokenizer, a pre-training and a segmentation of it."""
    folder = tmp_path_factory.mktemp("segment")
    write_scenes(folder / "data" / "train", 12)
    write_scenes(folder / "data" / "val", 5, 1)
    images = write_images(folder / "images", 8)
    common = [*TINY, "--epochs", 1, "--data", images]
    assert call("tokenizer", *common, *TOKENIZER, "--out", folder / "tokenizer") == 0
    command = [*common, *PRETRAIN, "--tokenizer", folder / "tokenizer", "--out", folder / "pretrain"]
    assert call("pretrain", *command, "--layer-scale", 0.1) == 0
    assert segment(folder, "trained") == 0
    return folder


def segment(runs: Path, out: str, *more: object, weights: str = "pretrain", data: str = "data") -> int:
    weights = weights if weights == "none" else runs / weights
    return call("segment", *SMALL, "--data", runs / data, "--weights", weights, "--out", runs / out, *more)


def config(runs: Path, weights: str, *more: object) -> SegmentConfig:
    options = [*SMALL, "--weights", runs / weights, *more]
    return parse(SegmentConfig, SEGMENT, [str(option) for option in options])[0]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_it_learns_to_tell_colours(runs):
    assert segment(runs, "learnt", *PLAIN, "--epochs", 12, "--lr", 5e-3, "--lr-batch", 4, weights="none") == 0
    assert results(runs / "learnt")["weights"]["miou"] > 0.75


def test_a_run_that_lost_its_last_checkpoint_ends_with_the_same_bits(runs):
    shutil.copytree(runs / "trained", runs / "resumed")
    shutil.rmtree(runs / "resumed" / "checkpoints" / checkpoints(runs / "resumed")[-1])
    assert segment(runs, "resumed") == 0
    assert "resumed at step 6 of 9" in (runs / "resumed" / "log.txt").read_text()
    assert_same_bits(runs / "resumed", runs / "trained")
    assert results(runs / "resumed") == results(runs / "trained")


def test_it_starts_as_the_student_with_new_heads(runs):
    said: list[str] = []
    model = start_segmenter(config(runs, "pretrain"), 3, said.append).eval()
    student = load_run_model(runs / "pretrain")[0]
    assert model.rel_pos_bias is None and student.rel_pos_bias is not None
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_tokens(x), student.forward_tokens(x), rtol=1e-5, atol=1e-5)
    assert "decode_head" in said[0]


def test_it_starts_as_the_tokenizers_encoder(runs):
    model = start_segmenter(config(runs, "tokenizer"), 3, print).eval()
    tokenizer = load_run_model(runs / "tokenizer")[0]
    x = torch.rand(2, 3, 32, 32)
    ours, theirs = model.forward_tokens(normalise(x)), tokenizer.encoder.forward_tokens(2 * x - 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_evaluate_alone_repeats_the_last_numbers_and_trains_nothing(runs):
    shutil.copytree(runs / "trained", runs / "evaluated")
    (runs / "evaluated" / "results.json").unlink()
    assert segment(runs, "evaluated", "--evaluate") == 0
    assert results(runs / "evaluated") == results(runs / "trained")
    assert_same_bits(runs / "evaluated", runs / "trained")
    assert load_segmenter(runs / "evaluated")[0].config.num_classes == 3
