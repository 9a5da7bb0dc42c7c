"""The teacher's features are computed once for a fixed number of views, and belong to exactly those views."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast import teachers
from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder, ImageList
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import TokenizerView
from beitv2_fast.distributed import World
from beitv2_fast.errors import UserError
from beitv2_fast.teachers import features as teacher_features
from beitv2_fast.teachers.features import TeacherFeatures

from ..support.training import TINY, TOKENIZER, call, write_images

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
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(7):
        pixels = torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    images = check_images(find_images(folder), cache=None, min_size=8, workers=0)
    return ImageFolder(images, TokenizerView(16), seed=3, views=2)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_features, "IMAGES_PER_FILE", 3)


def features(folder: Path, dataset: ImageFolder, network: Teacher, **identity: object) -> TeacherFeatures:
    folder.mkdir(exist_ok=True)
    identity = {"teacher": "means", **identity}
    memo = folder / "memo.json"
    options = {"shape": (4, 3), "identity": identity, "memo": memo, "batch_size": 2}
    return TeacherFeatures(folder / "features", dataset, network, WORLD, **options)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "features").rglob("*.npy"))


def reopened(dataset: ImageFolder, views: int = 2, **changes: object) -> ImageFolder:
    """The same images as another run sees them."""
    images = check_images(find_images(dataset.images.root), cache=None, min_size=8, workers=0)
    return ImageFolder(images, changes.get("view", TokenizerView(16)), seed=changes.get("seed", 3), views=views)


def test_a_batch_of_any_epoch_finds_the_features_of_its_own_crops(dataset, tmp_path):
    found = features(tmp_path, dataset, Teacher())
    for batch in train_loader(dataset, batch_size=3, total_steps=10):  # 5 epochs of 2 steps
        expected = Teacher()(batch["image"])
        torch.testing.assert_close(found(batch["view"], batch["index"]), expected, rtol=0, atol=1e-3)  # kept in fp16


def test_features_that_lie_on_a_device_are_those_of_the_files(dataset, tmp_path):
    found = features(tmp_path, dataset, Teacher())
    views, indices = torch.tensor([1, 0, 1, 0]), torch.tensor([6, 2, 3, 0])
    expected = found(views, indices)
    found.on_device = found.stacked(torch.device("cpu"))
    assert found.on_device.shape == (14, 4, 3) and found.on_device.dtype == torch.float16
    assert torch.equal(found(views, indices), expected) and found(views, indices).dtype == torch.float32


def test_an_image_has_as_many_views_as_asked_for(dataset):
    crops = [dataset[epoch, 0]["image"] for epoch in range(4)]
    assert torch.equal(crops[0], crops[2]) and torch.equal(crops[1], crops[3])
    assert not torch.equal(crops[0], crops[1])


def test_only_what_is_missing_is_computed_again(dataset, tmp_path):
    first = Teacher()
    features(tmp_path, dataset, first)
    assert first.seen == 14
    next((tmp_path / "features").rglob("view1_images0000003_*.npy")).unlink()
    second = Teacher()
    features(tmp_path, dataset, second)
    assert second.seen == 3


def test_another_teacher_does_not_get_the_features_of_this_one(dataset, tmp_path):
    features(tmp_path, dataset, Teacher(), weights="a")
    other = Teacher()
    features(tmp_path, dataset, other, weights="b")
    assert other.seen == 14


def test_the_features_are_the_same_bits_after_an_interruption(dataset, tmp_path):
    whole = features(tmp_path / "whole", dataset, Teacher())
    features(tmp_path / "resumed", dataset, Teacher())
    for file in list((tmp_path / "resumed").rglob("view0*.npy")):
        file.unlink()
    resumed = features(tmp_path / "resumed", dataset, Teacher())
    assert all((whole.parts[key] == resumed.parts[key]).all() for key in whole.parts)


@pytest.mark.parametrize("changes", [{"seed": 4}, {"view": TokenizerView(16, (0.5, 1.0))}])
def test_another_seed_or_crop_does_not_get_these_features(dataset, tmp_path, changes):
    features(tmp_path, dataset, Teacher())
    other = Teacher()
    features(tmp_path, reopened(dataset, **changes), other)
    assert other.seen == 14


def test_another_run_with_more_views_computes_only_those(dataset, tmp_path):
    features(tmp_path, dataset, Teacher())
    other = Teacher()
    found = features(tmp_path, reopened(dataset, views=3), other)
    assert other.seen == 7
    batch = next(iter(train_loader(reopened(dataset, views=3), batch_size=3, total_steps=1)))
    expected = Teacher()(batch["image"])
    torch.testing.assert_close(found(batch["view"], batch["index"]), expected, rtol=0, atol=1e-3)


def test_a_copy_of_the_images_elsewhere_finds_the_same_features(dataset, tmp_path):
    features(tmp_path, dataset, Teacher())
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in dataset.images.paths:
        shutil.copyfile(dataset.images.root / path, copy / path)  # other times
    other = Teacher()
    images = check_images(find_images(copy), cache=None, min_size=8, workers=0)
    features(tmp_path, ImageFolder(images, TokenizerView(16), seed=3, views=2), other)
    assert other.seen == 0


def test_an_image_that_was_replaced_under_its_name_is_seen_by_the_teacher(dataset, tmp_path):
    features(tmp_path, dataset, Teacher())
    Image.new("RGB", (30, 40), (200, 10, 30)).save(dataset.images.root / "4.png")
    other = Teacher()
    found = features(tmp_path, reopened(dataset), other)
    assert other.seen == 6  # its part of three images, in two views
    color = torch.tensor([200, 10, 30]) / 255
    expected = color.expand(1, 4, 3)
    torch.testing.assert_close(found(torch.tensor([1]), torch.tensor([4])), expected, rtol=0, atol=1e-3)


def test_bytes_of_unchanged_images_are_read_once(dataset, tmp_path, monkeypatch):
    features(tmp_path, dataset, Teacher())
    read, whole = [], ImageList.read
    monkeypatch.setattr(ImageList, "read", lambda self, index: read.append(index) or whole(self, index))
    features(tmp_path, dataset, Teacher())
    assert read == [0]  # for the crop that stands for the code before the teacher


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "header", "other_shape", "pickle"])
def test_a_damaged_file_is_computed_anew(dataset, tmp_path, damage):
    whole = features(tmp_path, dataset, Teacher())
    expected = {part: np.array(rows) for part, rows in whole.parts.items()}
    file = files(tmp_path)[1]
    content = file.read_bytes()
    if damage == "other_shape":
        np.save(file, np.zeros((3, 4, 2), np.float16))
    elif damage == "pickle":
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    else:
        damaged = {"cut": content[:-1], "longer": content + b"0", "empty": b"", "header": b"x" + content[1:]}
        file.write_bytes(damaged[damage])
    network = Teacher()
    again = features(tmp_path, dataset, network)
    assert network.seen == 3
    assert all((again.parts[part] == rows).all() for part, rows in expected.items())


def test_two_runs_that_fill_a_folder_at_the_same_time_both_see_all_of_it(dataset, tmp_path):
    """Both are held at their first batch until the other one has come to its own."""
    together = threading.Barrier(2)
    found: list[TeacherFeatures] = []

    class Slow(Teacher):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if not self.seen:
                together.wait(60)
            return super().__call__(images)

    def run(folder: Path) -> None:
        found.append(features(folder, reopened(dataset), Slow()))

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "shared").mkdir()
    for name in ("one", "two"):
        (tmp_path / name / "features").symlink_to(tmp_path / "shared")
    threads = [threading.Thread(target=run, args=(tmp_path / name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = features(tmp_path / "alone", dataset, Teacher())
    for one in found:
        assert all((one.parts[part] == rows).all() for part, rows in alone.parts.items())
    assert len(found) == 2 and not list((tmp_path / "shared").rglob(".*"))


def test_what_another_run_has_finished_meanwhile_is_taken_over(dataset, tmp_path):
    class Overtaken(Teacher):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if not self.seen:
                self.other = Teacher()
                features(tmp_path, reopened(dataset), self.other)
            return super().__call__(images)

    network = Overtaken()
    features(tmp_path, dataset, network)
    assert network.other.seen == 14 and network.seen <= 3


def test_one_loader_reads_the_images_of_all_files(dataset, tmp_path, monkeypatch):
    loaders, original = [], teacher_features.batch_loader
    monkeypatch.setattr(teacher_features, "batch_loader", lambda *a: loaders.append(a) or original(*a))
    features(tmp_path, dataset, Teacher())
    assert len(loaders) == 1 and len(files(tmp_path)) == 6


def test_a_file_being_written_is_never_read_and_an_old_one_is_removed(dataset, tmp_path):
    features(tmp_path, dataset, Teacher())
    file = files(tmp_path)[0]
    young, old = (file.with_name(f".{file.name}.{name}") for name in ("young", "old"))
    file.rename(young)
    shutil.copyfile(young, old)
    os.utime(old, (0, 0))
    network = Teacher()
    features(tmp_path, dataset, network)
    assert network.seen == 3 and young.exists() and not old.exists()


def test_a_full_disk_is_told_before_the_teacher_starts(dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 300)
    monkeypatch.setattr(teacher_features.shutil, "disk_usage", lambda path: usage)
    network = Teacher()
    with pytest.raises(UserError, match=r"0\.0 GB are free.*Make room .* --teacher-cache on another disk"):
        features(tmp_path, dataset, network)
    assert network.seen == 0


def test_a_disk_that_fills_up_is_told_and_leaves_no_part_of_a_file(dataset, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    memo = tmp_path / "memo.json"
    teacher_features.content_hashes(dataset.images, memo)  # the hashes are there already
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        with pytest.raises(UserError, match=r"File too large.*Make room"):
            features(tmp_path, dataset, Teacher())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [path for path in (tmp_path / "features").rglob("*") if path.is_file()]
    network = Teacher()
    features(tmp_path, dataset, network)
    assert network.seen == 14


def test_features_beyond_fp16_are_refused(dataset, tmp_path):
    class Huge(Teacher):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__(images) + 1e6

    with pytest.raises(UserError, match="beyond the range of fp16"):
        features(tmp_path, dataset, Huge())


@pytest.mark.slow
def test_the_command_shares_a_cache_between_runs(tmp_path, monkeypatch):
    """The second run, with another model and number of codes, never asks its teacher."""
    images, cache = write_images(tmp_path / "images", 6), tmp_path / "cache"
    options = [*TINY, *TOKENIZER, "--epochs", 1, "--data", images, "--views", 2, "--teacher-cache", cache]
    assert call("tokenizer", *options, "--out", tmp_path / "one") == 0
    assert not (tmp_path / "one" / "teacher_features").exists() and len(list(cache.rglob("*.npy"))) == 4
    monkeypatch.setattr(
        teachers.networks.EfficientNetLite0, "features", lambda *_: pytest.fail("the teacher was asked")
    )
    assert call("tokenizer", *options, "--out", tmp_path / "two", "--num-codes", 8, "--dim", 16) == 0


def test_a_cache_without_views_is_refused(tmp_path, capsys):
    options = ["--data", write_images(tmp_path / "images", 4), "--out", tmp_path / "run", "--views", 0]
    assert call("tokenizer", *TINY, *TOKENIZER, *options, "--teacher-cache", tmp_path / "cache") == 2
    assert "--views is 0" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_read_under_autocast(tmp_path, dataset, dtype):
    kept = features(tmp_path / "kept", dataset, Teacher())
    views, indices = torch.tensor([0, 1, 1]), torch.tensor([6, 0, 3])
    expected = kept(views, indices)
    with torch.autocast("cpu", dtype):
        found = kept(views, indices)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
