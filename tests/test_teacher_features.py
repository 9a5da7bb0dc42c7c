"""The teacher's features are computed once for a fixed number of views, and belong to exactly those views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from beitv2_fast import teacher_features
from beitv2_fast.data import ImageFolder, TokenizerView, check_images, find_images, train_loader
from beitv2_fast.distributed import World
from beitv2_fast.teacher_features import TeacherFeatures

WORLD = World(0, 1, torch.device("cpu"))


class Teacher:
    """Patch means of a 16 px image, as [B, 4, 3]; counts the images it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)


@pytest.fixture
def dataset(tmp_path: Path) -> ImageFolder:
    generator = torch.Generator().manual_seed(0)
    for i in range(7):
        pixels = torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    images = check_images(find_images(tmp_path), cache=None, min_size=8, workers=0)
    return ImageFolder(images, TokenizerView(16), seed=3, views=2)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_features, "IMAGES_A_FILE", 3)


def features(folder: Path, dataset: ImageFolder, network: Teacher, **identity: object) -> TeacherFeatures:
    return TeacherFeatures(folder / "features", dataset, network, WORLD, identity=identity, batch_size=2)


def test_a_batch_of_any_epoch_finds_the_features_of_its_own_crops(dataset, tmp_path):
    found = features(tmp_path, dataset, Teacher())
    for batch in train_loader(dataset, batch_size=3, total_steps=10):  # 5 epochs of 2 steps
        expected = Teacher()(batch["image"])
        torch.testing.assert_close(found(batch["view"], batch["index"]), expected, rtol=0, atol=1e-3)  # kept in fp16


def test_an_image_has_as_many_views_as_asked_for(dataset):
    crops = [dataset[epoch, 0]["image"] for epoch in range(4)]
    assert torch.equal(crops[0], crops[2]) and torch.equal(crops[1], crops[3])
    assert not torch.equal(crops[0], crops[1])


def test_only_what_is_missing_is_computed_again(dataset, tmp_path):
    first = Teacher()
    features(tmp_path, dataset, first)
    assert first.seen == 14
    next((tmp_path / "features").rglob("view1_images0000003.npy")).unlink()
    second = Teacher()
    features(tmp_path, dataset, second)
    assert second.seen == 3


def test_another_teacher_does_not_get_the_features_of_this_one(dataset, tmp_path):
    features(tmp_path, dataset, Teacher(), teacher="a")
    other = Teacher()
    features(tmp_path, dataset, other, teacher="b")
    assert other.seen == 14


def test_the_features_are_the_same_bits_after_an_interruption(dataset, tmp_path):
    whole = features(tmp_path / "whole", dataset, Teacher())
    features(tmp_path / "resumed", dataset, Teacher())
    for file in list((tmp_path / "resumed").rglob("view0*.npy")):
        file.unlink()
    resumed = features(tmp_path / "resumed", dataset, Teacher())
    assert all((whole.parts[key] == resumed.parts[key]).all() for key in whole.parts)
