"""How a data set may lie on disk: its splits, classes and other files, for every command that reads images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.config.downstream import ProbeConfig
from beitv2_fast.data.find import find_images, find_split, held_out_images
from beitv2_fast.data.names import SPLITS
from beitv2_fast.distributed import World
from beitv2_fast.errors import DataError
from beitv2_fast.runs.folder import RunFolder
from beitv2_fast.train.linear_probe import find_labeled
from beitv2_fast.weights import convert
from beitv2_fast.weights.files import write as write_weights

from ..support.training import TINY, TOKENIZER, call
from ..support.weights import tokenizer
from .test_images import save


def write(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name)
    return root


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("change", (str.lower, str.title, str.upper))
def test_every_usual_spelling_names_the_split(tmp_path, split, change):
    for spelling in map(change, SPLITS[split]):
        root = write(tmp_path / spelling, f"{spelling}/cat/a.png", "other/cat/b.png")
        images = find_images(root, split)
        assert (images.paths, images.classes, find_split(root, split)) == (["cat/a.png"], ["cat"], split)
        assert images.root == root / spelling and "(1: other)" in images.summary


@pytest.mark.parametrize(
    "train, test",
    [
        ("training_set", "test_set"),
        ("Train Images", "Test Images"),
        ("train2017", "test2017"),
        ("trainingSet", "testSet"),
    ],
)
def test_a_split_s_name_may_end_in_what_it_is_a_set_of_and_a_year(tmp_path, train, test):
    root = write(tmp_path, f"{train}/cat/a.png", f"{test}/cat/b.png")
    for split, path in (("train", tmp_path / train), ("test", tmp_path / test)):
        images = find_images(root, split, labeled=True)
        assert (images.root, len(images), images.classes) == (path, 1, ["cat"])
    with pytest.raises(DataError, match="nothing for val"):
        find_images(root, "val")


@pytest.mark.parametrize(
    "name", ["trainer", "test tube", "valley", "devil", "trainannot", "train_masks", "set1", "images"]
)
def test_other_names_that_begin_as_a_split_are_classes(tmp_path, name):
    root = write(tmp_path, f"{name}/a.png", "cat/b.png")
    assert find_images(root, "train").classes == sorted([name, "cat"])


def test_test_images_never_enter_a_pre_training(tmp_path):
    kaggle = write(tmp_path / "kaggle", "Training/cat/a.png", "Testing/cat/b.png")
    assert find_images(kaggle, "train").paths == ["cat/a.png"]
    classes_first = write(tmp_path / "mvtec", "bottle/train/a.png", "bottle/Test/b.png", "bottle/truth/c.png")
    images = find_images(classes_first, "train")
    assert images.paths == ["bottle/train/a.png", "bottle/truth/c.png"]
    assert "folders of other splits (1: bottle/Test)" in images.summary
    for names in (("cat/a.png", "test/b.png"), ("a.png", "Testing/b.png"), ("val/cat/b.png", "test/cat/c.png")):
        with pytest.raises(DataError, match=r"but nothing for train \(it may be named train, training, trn\)"):
            find_images(write(tmp_path / names[0].replace("/", "_"), *names), "train")


def test_a_name_of_a_split_is_preferred_to_its_spellings_and_two_spellings_are_refused(tmp_path):
    root = write(tmp_path, "Valid/a.png", "validation/b.png", "train/c.png")
    with pytest.raises(DataError, match="several folders that may be meant by val: Valid, validation"):
        find_images(root, "val")
    write(root, "val/d.png")
    assert find_images(root, "val").paths == ["d.png"]


def test_splits_that_are_read_together_are_no_classes(tmp_path):
    root = write(tmp_path, "Training/cat/a.png", "Testing/dog/b.png")
    images = find_images(root, labeled=True)
    assert len(images) == 2 and images.labels is None and images.classes == []


def test_folders_without_images_and_those_of_systems_are_no_classes(tmp_path):
    systems = ("__MACOSX/cat/._a.png", "@eaDir/a.png", ".ipynb_checkpoints/a.png", "lost+found/a.png", ".git/a.png")
    root = write(tmp_path, "cat/a.png", "cat/@eaDir/a.png", "dog/b.png", *systems)
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("")
    images = find_images(root)
    assert (images.paths, images.classes, images.labels) == (["cat/a.png", "dog/b.png"], ["cat", "dog"], [0, 1])
    assert "hidden files and what systems leave (6: .git, ...)" in images.summary
    assert "folders without images (2: empty, ...)" in images.summary


def test_an_image_beside_class_folders_is_named_and_does_not_take_the_classes_where_they_are_needed(tmp_path):
    root = write(tmp_path, "cat/a.png", "dog/b.png", "preview.png")
    images = find_images(root, labeled=True)
    assert (images.paths, images.labels) == (["cat/a.png", "dog/b.png"], [0, 1])
    assert images.rejected == [("preview.png", "no label: it lies in no class folder")]
    assert find_images(root).paths == ["cat/a.png", "dog/b.png", "preview.png"]


def test_every_format_that_pillow_reads_is_read_whatever_the_case_of_its_suffix(tmp_path):
    suffixes = ("webp", "bmp", "tif", "jfif", "JPEG", "avif", "tga", "pcx", "dib", "apng", "jp2", "j2k", "qoi", "ppm")
    image = Image.fromarray(np.full((32, 40, 3), 77, np.uint8))
    formats = {"apng": "PNG", "avif": "AVIF"}
    for suffix in suffixes:
        image.save(tmp_path / f"a.{suffix}", format=formats.get(suffix))
    images = find_images(tmp_path)
    assert images.paths == sorted(f"a.{suffix}" for suffix in suffixes)
    for i in range(len(images)):
        assert abs(np.asarray(images.open(i)).astype(int) - 77).max() <= 3, images.paths[i]


def test_what_nobody_reads_is_counted_by_kind(tmp_path):
    root = write(tmp_path, "cat/a.png", ".hidden.png")
    for name in ("cat/b.heic", "cat/c.HEIC", "cat/d", "labels.csv"):
        (root / name).write_text("")
    said = find_images(root).summary
    assert "; passed over: files ending in .heic (2: cat/b.heic, ...), " in said
    for kind in (
        "files ending in .csv (1: labels.csv)",
        "files without a suffix (1: cat/d)",
        "what systems leave (1: .hidden.png)",
    ):
        assert kind in said
    (root / "cat" / "a.png").unlink()
    with pytest.raises(DataError, match=r"holds no images; passed over: files ending in .heic [(]2: "):
        find_images(root)


def test_the_summary_says_classes_and_layout(tmp_path):
    root = write(tmp_path, *(f"train/{name}/a.png" for name in "abcdefg"))
    assert find_images(root, "train").summary == (
        f"found 7 images, 7 classes (a, b, c, d, e, ...), class folders in {root / 'train'}"
    )
    assert (
        find_images(write(tmp_path / "flat", "a.png")).summary
        == f"found 1 images, no classes, folder in {tmp_path / 'flat'}"
    )


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory) -> Path:
    """A set with the usual names of a download: Training, Testing, and what a Mac left."""
    root = tmp_path_factory.mktemp("kaggle")
    for split, count in (("Training", 4), ("Testing", 2)):
        for label in ("cat", "dog"):
            for i in range(count):
                save(root / split / label / f"{i}.png", color=(10 * i, 90, 200 if label == "cat" else 20))
    save(root / "Training" / "__MACOSX" / "x.png")
    return root


def test_trainings_read_the_training_images_and_say_what_they_found(kaggle, tmp_path):
    out = tmp_path / "run"
    assert call("tokenizer", *TINY, *TOKENIZER, "--data", kaggle, "--epochs", 1, "--out", out) == 0
    log = (out / "log.txt").read_text()
    assert f"found 8 images, 2 classes (cat, dog), class folders in {kaggle / 'Training'}; passed over:" in log
    assert len((out / "images.jsonl").read_text().splitlines()) == 1 + 8


def test_a_fine_tuning_finds_training_and_test_images_and_its_classes(kaggle, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", kaggle, "--weights", "none", "--epochs", 1, "--out", out, "--loader", "torchvision"]
    assert call("finetune", *TINY, *options) == 0
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    assert json.loads((out / "results.json").read_text())["weights"]["images"] == 4
    capsys.readouterr()
    evaluated = ["--model", out, "--data", kaggle, "--out", tmp_path / "evaluated"]
    assert call("evaluate", *evaluated, "--device", "cpu", "--workers", 0) == 2
    assert "is divided into Testing, Training. Give the one to evaluate on" in capsys.readouterr().err


def test_the_probe_and_the_report_find_the_held_out_images(kaggle, tmp_path):
    config = ProbeConfig(data=kaggle, out=tmp_path / "run", workers=0)
    splits = find_labeled(kaggle, config, RunFolder(config), World(0, 1, None), 8)
    assert {name: len(images) for name, images in splits.items()} == {"train": 8, "test": 4}
    assert len(held_out_images(kaggle)) == 4


def test_encoding_reads_every_split_and_says_so(kaggle, tmp_path, caplog):
    model = tokenizer()
    file = tmp_path / "t.safetensors"
    write_weights(file, convert(model.state_dict(), "beitv2_fast"), "beitv2_fast", model.config)
    caplog.set_level("INFO")
    config = EncodeConfig(tokenizer=file, out=tmp_path / "codes.npz", device="cpu", precision="fp32", workers=0)
    assert encode_folder(kaggle, config)[0] == 12
    assert "found 12 images, no classes" in caplog.text
