"""Sliding windows, several scales, the scores against torchmetrics and by hand, and the pictures."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beitv2_fast.config.downstream import SEGMENT
from beitv2_fast.data.find import find_images
from beitv2_fast.distributed import World
from beitv2_fast.downstream.segmentation import evaluation
from beitv2_fast.downstream.segmentation.evaluation import Scores, Slide, evaluate_segmenter, sliding_logits
from beitv2_fast.downstream.segmentation.head import resize
from beitv2_fast.downstream.segmentation.masks import IGNORED, find_masks, label_table
from beitv2_fast.downstream.segmentation.overlays import GAP, overlay, picture, write_overlays
from beitv2_fast.downstream.segmentation.views import SegmentationFolder
from beitv2_fast.models.vit import normalize
from beitv2_fast.pictures import class_colors
from beitv2_fast.runs.folder import RunFolder

ONE = World(0, 1, torch.device("cpu"))
CLASSES = 3
needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed (extra: segment)"
)


class Brightest(nn.Module):
    """Every pixel by itself: its channels are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        self.sizes.append(x.shape)
        return (x,)


class ByPlace(nn.Module):
    """Logits that say where in the window a pixel lies, so that overlaps show."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
        place = (rows[:, None] * 100.0 + columns).expand(len(x), 1, -1, -1)
        return (torch.cat([place, x[:, :1]], 1),)


SIZES = [(16, 16), (40, 16), (33, 47), (7, 16), (5, 9), (16, 100), (17, 17)]


@pytest.mark.parametrize("size", SIZES)
def test_a_network_of_single_pixels_is_not_changed_by_windows(size):
    x, model = torch.randn(3, *size), Brightest()
    found = sliding_logits(model, x, Slide(16, 11, 16, batch=3))
    torch.testing.assert_close(found, x)
    assert all(shape[2:] == (16, 16) and shape[0] <= 3 for shape in model.sizes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", (4, 10, 16))
def test_overlapping_windows_are_averaged(size, stride):
    x = torch.randn(3, *size)
    found = sliding_logits(ByPlace(), x, Slide(16, stride, 16))
    sums, counts = torch.zeros(max(size[0], 16), max(size[1], 16)), torch.zeros(max(size[0], 16), max(size[1], 16))
    window = (torch.arange(16)[:, None] * 100.0 + torch.arange(16)).float()
    corners = [sorted({min(k * stride, max(side - 16, 0)) for k in range(200)}) for side in size]
    for y, z in itertools.product(*corners):
        sums[y : y + 16, z : z + 16] += window
        counts[y : y + 16, z : z + 16] += 1
    assert counts.min() >= 1  # every pixel is seen
    torch.testing.assert_close(found[0], (sums / counts)[: size[0], : size[1]])


def pixels(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_scales_and_sides_are_averaged_as_probabilities():
    image, model = pixels((20, 30)), Brightest()
    slide = Slide(16, 11, 20, scales=(0.5, 1.0), flip=True)
    found = slide(model, image)
    x = image[None].float() / 255
    small = nn.functional.interpolate(x, (10, 15), mode="bilinear", antialias=True)
    wanted = 0.5 * sum(resize(normalize(y), (20, 30)).softmax(1)[0] for y in (small, x))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.ones(20, 30))
    assert len(model.sizes) == slide.forwards((20, 30))


def test_flipping_makes_a_lopsided_network_symmetric():
    class Lopsided(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            side = torch.linspace(-3, 3, x.shape[3]).expand(len(x), 1, x.shape[2], -1)
            return (torch.cat([side, x[:, :1]], 1),)

    image = pixels((16, 8))
    image = torch.cat([image, image.flip(2)], 2)
    plain, both = Slide(16, 16, 16)(Lopsided(), image), Slide(16, 16, 16, flip=True)(Lopsided(), image)
    torch.testing.assert_close(both, both.flip(2))
    assert not torch.allclose(plain, plain.flip(2), atol=0.1)


def folder(path: Path, count: int = 5) -> SegmentationFolder:
    """Images of different sizes whose brightest channel is the label, but for some pixels; a border that is ignored."""
    draw = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (path / kind).mkdir(exist_ok=True, parents=True)
    for i in range(count):
        labels = draw.integers(0, CLASSES, (20 + i, 31 - i)).astype(np.uint8)
        colors = 200 * np.eye(CLASSES)[labels] + draw.integers(0, 50, (*labels.shape, 3))
        labels[draw.random(labels.shape) < 0.2] = 1
        labels[:2] = IGNORED
        Image.fromarray(colors.astype(np.uint8)).save(path / "images" / f"{i}.png")
        Image.fromarray(labels).save(path / "masks" / f"{i}.png")
    images = find_images(path / "images")
    return SegmentationFolder(images, find_masks(images, path / "masks", None, 0), label_table((), False))


SLIDE = Slide(16, 11, 20)


@needs_torchmetrics
def test_the_scores_are_torchmetrics_and_those_by_hand(tmp_path):
    torchmetrics = importlib.import_module("torchmetrics.classification")
    data, model = folder(tmp_path), Brightest()
    scores = evaluate_segmenter(model, data, CLASSES, SLIDE, ONE, keep=range(len(data)))
    shown = [data.__getitems__([(0, i)]) for i in range(len(data))]
    truth = torch.cat([x["mask"].flatten() for x in shown]).long()
    found = torch.cat([scores.predictions[i].flatten() for i in range(len(data))]).long()
    numbers, options = scores.numbers(), dict(num_classes=CLASSES, ignore_index=IGNORED)
    for name, metric in {
        "miou": torchmetrics.MulticlassJaccardIndex(**options, average="macro"),
        "macc": torchmetrics.MulticlassAccuracy(**options, average="macro"),
        "aacc": torchmetrics.MulticlassAccuracy(**options, average="micro"),
    }.items():
        assert numbers[name] == pytest.approx(metric(found, truth).item(), rel=1e-6)
    counts = truth != IGNORED
    sets = [((found == k) & counts, truth == k) for k in range(CLASSES)]
    ious = [(a & b).sum().item() / (a | b).sum().item() for a, b in sets]
    assert numbers["miou"] == pytest.approx(sum(ious) / CLASSES, rel=1e-6) and 0.3 < numbers["miou"] < 0.9
    assert scores.iou().tolist() == pytest.approx(ious, rel=1e-6)
    assert scores.confusion.sum() == counts.sum() and numbers["images"] == 5


def test_a_class_that_is_nowhere_counts_for_nothing_and_one_that_is_only_predicted_as_0():
    absent = Scores(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]), 1).numbers()
    assert absent == {"miou": pytest.approx((0.75 + 0.5) / 2), "macc": 0.875, "aacc": 0.8, "images": 1}
    predicted = Scores(torch.tensor([[6, 0, 2], [0, 2, 0], [0, 0, 0]]), 1).numbers()
    assert predicted["miou"] == pytest.approx((0.75 + 1 + 0) / 3) and predicted["macc"] == 0.875


@needs_torchmetrics
def test_every_rank_runs_as_many_forwards_and_together_they_see_every_image_once(tmp_path, monkeypatch):
    data, models = folder(tmp_path), [Brightest(), Brightest()]
    slide = Slide(16, 11, 20, batch=2)
    monkeypatch.setattr(World, "sum", lambda self, x: x)
    parts = [evaluate_segmenter(m, data, CLASSES, slide, World(rank, 2, ONE.device)) for rank, m in enumerate(models)]
    assert len(models[0].sizes) == len(models[1].sizes)
    alone = evaluate_segmenter(Brightest(), data, CLASSES, slide, ONE)
    assert torch.equal(parts[0].confusion + parts[1].confusion, alone.confusion)


@needs_torchmetrics
def test_the_model_is_in_eval_mode_meanwhile_and_the_caller_hears_of_every_image(tmp_path):
    class Watched(Brightest):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            assert not self.training
            return super().forward(x)

    heard, model = [], Watched()
    evaluate_segmenter(model, folder(tmp_path), CLASSES, SLIDE, ONE, progress=lambda: heard.append(1))
    assert model.training and len(heard) == 5


def test_classes_have_different_colors():
    colors = class_colors(150).int()
    assert len(colors.unique(dim=0)) == 150
    assert (colors[1:] - colors[:-1]).abs().sum(1).min() > 60  # neighboring numbers


def test_a_picture_shows_image_truth_and_prediction_side_by_side():
    image, truth = pixels((8, 10)), torch.zeros(8, 10, dtype=torch.uint8)
    truth[:, 5:], prediction = IGNORED, torch.ones(8, 10, dtype=torch.uint8)
    made = picture(image, truth, prediction)
    assert made.shape == (3, 8, 30 + 2 * GAP) and torch.equal(made[:, :, :10], image)
    middle, right = made[:, :, 10 + GAP : 20 + GAP], made[:, :, 20 + 2 * GAP :]
    assert torch.equal(middle, overlay(image, truth))
    assert torch.equal(right[:, :, :5], overlay(image, prediction)[:, :, :5])
    assert torch.equal(right[:, :, 5:], middle[:, :, 5:])  # ignored in both
    assert not torch.equal(right[:, :, :5], middle[:, :, :5])


def test_overlays_are_written_under_their_images_names(tmp_path):
    data = folder(tmp_path / "data")
    run = RunFolder(SEGMENT["demo"].__class__(out=tmp_path / "run"))
    write_overlays(run, 7, data, {3: torch.zeros(23, 28, dtype=torch.uint8)})
    with Image.open(tmp_path / "run" / "overlays" / "3.png") as image:
        assert image.size == (3 * 28 + 2 * GAP, 23)
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_evaluating_without_torchmetrics_names_the_extra(tmp_path, monkeypatch):
    def missing(module: str, extra: str, purpose: str) -> None:
        raise ImportError(f"{module} {extra}")

    monkeypatch.setattr(evaluation, "require", missing)
    with pytest.raises(ImportError, match=r"torchmetrics.* segment"):
        evaluate_segmenter(Brightest(), folder(tmp_path), CLASSES, SLIDE, ONE)
