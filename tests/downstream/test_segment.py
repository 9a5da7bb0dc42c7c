"""Segmentation from students, tokenizers and random weights: it learns, resumes to the same bits, is evaluated."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from beitv2_fast.config.downstream import SEGMENT, SegmentConfig
from beitv2_fast.config.options import parse
from beitv2_fast.downstream.segmentation import training
from beitv2_fast.downstream.segmentation.training import load_segmenter, start_segmenter
from beitv2_fast.models.vit import normalize
from beitv2_fast.train.segment import PolySchedule, SegmentTask
from beitv2_fast.weights.build import load_run_model

from ..support.downstream import SMALL, results, write_scenes
from ..support.training import assert_same_bits, call

PLAIN = ["--no-distortion", "--scale-range", 1, 1, "--dropout", 0]


@pytest.fixture(scope="module")
def runs(starts, tmp_path_factory) -> Path:
    """A folder with data/train and data/val of three classes, a tokenizer, a pre-training and a segmentation of it."""
    folder = shutil.copytree(starts, tmp_path_factory.mktemp("segment") / "runs")
    write_scenes(folder / "data" / "train", 12)
    write_scenes(folder / "data" / "val", 5, 1)
    assert segment(folder, "trained") == 0
    return folder


def segment(runs: Path, out: str, *more: object, weights: str = "pretrain", data: str = "data") -> int:
    weights = weights if weights == "none" else runs / weights
    return call("segment", *SMALL, "--data", runs / data, "--weights", weights, "--out", runs / out, *more)


def config(runs: Path, weights: str, *more: object) -> SegmentConfig:
    options = [*SMALL, "--weights", runs / weights, *more]
    return parse(SegmentConfig, SEGMENT, [str(option) for option in options])[0]


def test_it_learns_to_tell_colors(runs):
    assert segment(runs, "learned", *PLAIN, "--epochs", 12, "--lr", 5e-3, "--lr-batch", 4, weights="none") == 0
    assert results(runs / "learned")["weights"]["miou"] > 0.75


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
    ours, theirs = model.forward_tokens(normalize(x)), tokenizer.encoder.forward_tokens(2 * x - 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_evaluate_alone_repeats_the_last_numbers_and_trains_nothing(runs):
    shutil.copytree(runs / "trained", runs / "evaluated")
    (runs / "evaluated" / "results.json").unlink()
    assert segment(runs, "evaluated", "--evaluate") == 0
    assert results(runs / "evaluated") == results(runs / "trained")
    assert_same_bits(runs / "evaluated", runs / "trained")
    assert load_segmenter(runs / "evaluated")[0].config.num_classes == 3


def test_the_schedule_is_poly_with_a_linear_warm_up():
    plan = PolySchedule.of(SEGMENT["base"], 20210, 8)
    assert (plan.images_per_step, plan.total_steps, plan.warmup_steps, plan.epochs) == (16, 160_000, 1500, 127)
    assert plan.lr(0) == 0 and plan.lr(750) == pytest.approx(0.5 * 5e-5 * (1 - 750 / 160_000))
    assert plan.lr(80_000) == pytest.approx(2.5e-5) and plan.lr(159_999) == pytest.approx(5e-5 / 160_000)
    by_epochs = replace(SEGMENT["base"], steps=0, epochs=2, warmup_epochs=1, power=2.0, min_lr=1e-5)
    plan = PolySchedule.of(by_epochs, 1600, 8)
    assert (plan.total_steps, plan.warmup_steps) == (200, 100)
    assert plan.lr(150) == pytest.approx(4e-5 * 0.25**2 + 1e-5)


def test_the_presets_are_the_references():
    base, large = SEGMENT["base"], SEGMENT["large"]
    assert (base.image_size, base.steps, base.lr, base.layer_decay, base.drop_path) == (512, 160_000, 5e-5, 0.75, 0.15)
    assert (large.dim, large.depth, large.lr, large.layer_decay, large.drop_path) == (1024, 24, 4e-5, 0.9, 0.2)
    after = SEGMENT["base_after_intermediate"], SEGMENT["large_after_intermediate"]
    assert after == (replace(base, layer_decay=0.85), replace(large, lr=3e-5))
    for preset in (base, large):
        assert (preset.num_classes, preset.reduce_zero_label, preset.auxiliary_weight) == (150, True, 0.4)
        assert preset.batch_size * 8 == preset.lr_batch == 16 and preset.clip_grad == preset.min_lr == 0


def test_the_loss_counts_ignored_pixels_as_zero_and_adds_the_auxiliary_heads(runs):
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return logits, auxiliary

    logits, auxiliary = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    mask[0, :4] = 255
    batch = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "mask": mask}
    loss, metrics = SegmentTask(load_segmenter(runs / "trained")[0], 0.4).loss(Fixed(), batch)
    flat = [x.permute(0, 2, 3, 1)[mask != 255].log_softmax(-1) for x in (logits, auxiliary)]
    labels = mask[mask != 255].long()
    sums = [-x[torch.arange(len(labels)), labels].sum() / mask.numel() for x in flat]
    torch.testing.assert_close(loss, sums[0] + 0.4 * sums[1])
    assert metrics["accuracy"] == pytest.approx((flat[0].argmax(-1) == labels).float().mean().item())


def test_another_segmentation_is_a_start_with_a_new_last_layer_for_other_classes(runs):
    said: list[str] = []
    trained = load_segmenter(runs / "trained")[0]
    same = start_segmenter(config(runs, "trained"), 3, said.append)
    assert "all weights were loaded" in said[0]
    assert torch.equal(same.decode_head.conv_seg.weight, trained.decode_head.conv_seg.weight)
    other = start_segmenter(config(runs, "trained", "--image-size", 64), 5, said.append)
    assert "conv_seg" in said[1] and other.decode_head.conv_seg.weight.shape[0] == 5
    assert torch.equal(other.fpn1[0].weight, trained.fpn1[0].weight)


def test_a_finished_run_evaluated_at_several_scales_has_both_results_and_pictures(runs):
    shutil.copytree(runs / "trained", runs / "scales")
    shutil.rmtree(runs / "scales" / "overlays")
    assert segment(runs, "scales", "--evaluate", "--multi-scale", "--scales", 0.5, 1.0) == 0
    found = results(runs / "scales")
    assert found["weights"] == results(runs / "trained")["weights"]
    assert 0 < found["multi_scale"]["miou"] != found["weights"]["miou"]
    pictures = sorted((runs / "scales" / "overlays").iterdir())
    assert [path.name for path in pictures] == ["0.png", "2.png"]
    with Image.open(pictures[0]) as image:
        assert image.size == (3 * 48 + 12, 40)


def test_the_weights_of_the_best_evaluation_are_kept_and_only_the_last_is_at_several_scales(runs, monkeypatch):
    """Epochs of 3 steps; the second is the best, and several scales do not count."""
    scores, evaluate = iter([0.3, 0.6, 0.5, 0.9]), training.evaluate_segmenter

    def scored(*given, **options):
        found = evaluate(*given, **options)
        numbers = {**found.numbers(), "miou": next(scores)}
        return SimpleNamespace(numbers=lambda: numbers, iou=found.iou, predictions=found.predictions)

    monkeypatch.setattr(training, "evaluate_segmenter", scored)
    options = ["--eval-every", 1, "--keep-checkpoints", 3, "--multi-scale", "--scales", 0.5]
    assert segment(runs, "best_of_three", *options) == 0
    assert next(scores, None) is None
    best = load_file(runs / "best_of_three" / "best" / "model.safetensors")
    at_6 = load_file(runs / "best_of_three" / "checkpoints" / "step_00000006" / "model.safetensors")
    assert all(torch.equal(best[name], at_6[name]) for name in at_6)


def test_masks_in_black_and_white_train_as_those_of_0_and_1(runs, tmp_path, capsys):
    folders = {white: shutil.copytree(runs / "data", tmp_path / str(white)) for white in (1, 255)}
    for white, folder in folders.items():
        for file in folder.glob("*/masks/*.png"):
            with Image.open(file) as mask:
                labels = np.array(mask)
            Image.fromarray(np.where(labels == 2, white, 0).astype(np.uint8)).save(file)
    assert segment(runs, str(tmp_path / "plain"), data=folders[1]) == 0
    assert segment(runs, str(tmp_path / "refused"), "--num-classes", 2, data=folders[255]) == 2
    assert "--label-values 0 255" in capsys.readouterr().err
    assert segment(runs, str(tmp_path / "named"), "--label-values", 0, 255, data=folders[255]) == 0
    assert_same_bits(tmp_path / "plain", tmp_path / "named")
    assert results(tmp_path / "plain")["weights"] == results(tmp_path / "named")["weights"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "{runs}/images"], "no images with masks"),
        (["--val", "{runs}/images"], "--val"),
        (["--num-classes", "2"], "labels beyond the 2 classes"),
        (["--batch-size", "1"], "two images"),
        (["--label-values", "0", "1"], "labels beyond the 2 classes"),
        (["--label-values", "0", "1", "0"], "names a label twice"),
        (["--loader", "dali"], "--loader dali"),
        (["--weights", "{runs}/nothing"], "nothing"),
        (["--evaluate"], "no run folder of a segmentation|no checkpoint yet"),
    ],
)
def test_mistakes_end_with_one_paragraph_that_says_what_to_do(runs, tmp_path, capsys, options, said):
    given = [option.format(runs=runs) for option in options]
    assert segment(runs, str(tmp_path / "run"), *given) == 2
    assert re.search(said, capsys.readouterr().err)
