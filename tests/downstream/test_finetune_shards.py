"""Labeled tar shards: fine-tuning on them is fine-tuning on the same images in class folders, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..data.test_shards import write_tar
from ..support.downstream import COLORS, EVALUATE, results, write_colors
from ..support.training import TINY, assert_same_bits, call

CLASSES = sorted(COLORS)
TUNE = [*TINY, "--epochs", 1, "--weights", "none", "--eval-every", 1]


def write_shards(folder: Path, shards: Path, labeled: bool = True) -> Path:
    """The images of class folders, in their order, two shards; KEY.cls is the number of the class."""
    files = sorted(folder.glob("*/*.png"))
    for number, part in enumerate((files[:5], files[5:])):
        members = []
        for file in part:
            key = f"{file.parent.name}_{file.stem}"
            members.append((f"{key}.png", file.read_bytes()))
            if labeled:
                members.append((f"{key}.cls", str(CLASSES.index(file.parent.name)).encode()))
        write_tar(shards / f"{number}.tar", members)
    return shards


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 4), ("val", 3)):
        write_shards(write_colors(folder / "data" / split, count), folder / "shards" / split)
    for name in ("data", "shards"):
        assert call("finetune", *TUNE, "--data", folder / name, "--out", folder / f"of_{name}") == 0
    return folder


def test_shards_train_and_evaluate_to_the_bits_of_class_folders(runs):
    assert_same_bits(runs / "of_shards", runs / "of_data")
    assert results(runs / "of_shards") == results(runs / "of_data")
    assert json.loads((runs / "of_shards" / "classes.json").read_text()) == ["0", "1", "2"]


def test_a_run_on_folders_is_evaluated_on_shards_by_the_classes_numbers(runs, tmp_path):
    command = ["--model", runs / "of_data", "--data", runs / "shards" / "val", "--out", tmp_path / "run"]
    assert call("evaluate", *command, *EVALUATE) == 0
    found = results(tmp_path / "run")["rows"][0]
    assert found["loss"] == pytest.approx(results(runs / "of_data")["weights"]["loss"], rel=1e-5)


def test_a_run_on_shards_is_evaluated_on_folders_once_it_is_told_its_classes_names(runs, tmp_path):
    command = ["--model", runs / "of_shards", "--data", runs / "data" / "val", "--out", tmp_path / "run"]
    assert call("evaluate", *command, *EVALUATE) == 2
    assert call("evaluate", *command, *EVALUATE, "--classes", runs / "data" / "train") == 0
    found = results(tmp_path / "run")["rows"][0]
    assert found["loss"] == pytest.approx(results(runs / "of_data")["weights"]["loss"], rel=1e-5)


def test_shards_with_some_classes_are_evaluated_among_all(runs, tmp_path):
    some = write_colors(tmp_path / "some", 2, CLASSES[:2])
    write_shards(some, tmp_path / "shards")
    command = ["--model", runs / "of_data", "--data", tmp_path / "shards", "--out", tmp_path / "run"]
    assert call("evaluate", *command, *EVALUATE) == 0
    assert results(tmp_path / "run")["rows"][0]["classes"] == 3


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ([("a.png", b""), ("b.png", b"")], "no image of the shards has a label"),
        ([("a.png", b""), ("a.cls", b"3")], "has an image of class 3, but the classifier knows 0 to 2"),
    ],
)
def test_shards_without_labels_or_with_unknown_ones_are_refused(runs, tmp_path, capsys, shards, said):
    image = next((runs / "data" / "val").glob("*/*.png")).read_bytes()
    members = [(name, image if name.endswith(".png") else content) for name, content in shards]
    write_tar(tmp_path / "shards" / "0.tar", members)
    command = ["--model", runs / "of_data", "--data", tmp_path / "shards", "--out", tmp_path / "run"]
    assert call("evaluate", *command, *EVALUATE) == 2
    assert said in capsys.readouterr().err
