"""The demo's photographs become an image folder: whole or not at all, and the same everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from beitv2_fast.data.find import find_images
from beitv2_fast.errors import UserError
from beitv2_fast.train.demo_images import split_images, write_demo_images

from ..support.training import write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("elpv_dataset", reason="the extra 'demo' is not installed")
    return write_demo_images(tmp_path_factory.mktemp("demo") / "cells")


CELLS = {"mono_defective": 369, "mono_intact": 705, "poly_defective": 452, "poly_intact": 1098}


def test_all_photographs_are_split_three_to_one_with_equal_shares_of_each_class(folder):
    train, test = find_images(folder, "train"), find_images(folder, "test")
    assert train.classes == test.classes == list(CELLS)
    assert (len(train), len(test)) == (1969, 655)
    of_class = [[images.labels.count(c) for c in range(len(CELLS))] for images in (train, test)]
    assert [sum(pair) for pair in zip(*of_class, strict=True)] == list(CELLS.values())
    assert [n / 1969 for n in of_class[0]] == pytest.approx([n / 655 for n in of_class[1]], abs=0.001)
    names = [path.rpartition("/")[2] for images in (train, test) for path in images.paths]
    assert len(set(names)) == 2624


def test_labels_and_cell_types_of_the_files_are_those_of_the_package(folder):
    utils = pytest.importorskip("elpv_dataset.utils")
    data = Path(utils.__file__).parent / "data"
    kinds = {"train": [], "test": []}
    for line in (data / "labels.csv").read_text().splitlines():
        path, probability, kind = line.split()
        label = f"{kind}_{'defective' if float(probability) >= 0.5 else 'intact'}"
        copies = [folder / split / label / Path(path).name for split in kinds]
        (copy,) = (file for file in copies if file.is_file())
        assert copy.stat().st_size == (data / path).stat().st_size
        kinds[copy.parts[-3]].append(kind)
    shares = [kinds[split].count("mono") / len(kinds[split]) for split in kinds]
    assert shares[0] == pytest.approx(shares[1], abs=0.001)


def test_the_folder_says_where_the_photographs_are_from_and_their_license(folder):
    text = (folder / "README.md").read_text()
    assert "elpv-dataset" in text and "CC BY-NC-SA 4.0" in text and "doi" in text


def test_a_second_call_changes_nothing(folder, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda *_: pytest.fail("copied again"))
    before = (folder / "README.md").stat().st_mtime_ns
    assert write_demo_images(folder) == folder
    assert (folder / "README.md").stat().st_mtime_ns == before


def test_a_kill_in_the_middle_leaves_no_folder_and_the_next_call_cleans_up(folder, tmp_path):
    program = (
        "import os, shutil, signal, sys\n"
        "from beitv2_fast.train.demo_images import write_demo_images\n"
        "copy, calls = shutil.copyfile, []\n"
        "def killed(*paths):\n"
        "    calls.append(copy(*paths))\n"
        "    if len(calls) == 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.copyfile = killed\n"
        "write_demo_images(sys.argv[1])\n"
    )
    out = tmp_path / "cells"
    assert subprocess.run([sys.executable, "-c", program, str(out)]).returncode == -9
    assert not out.exists() and len(os.listdir(tmp_path)) == 1
    write_demo_images(out)
    assert os.listdir(tmp_path) == ["cells"]
    assert find_images(out, "train").paths == find_images(folder, "train").paths  # the split is the same on every call


def test_a_failure_in_the_middle_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        write_demo_images(tmp_path / "cells")
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        write_demo_images(tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(UserError, match=r"pip install 'beitv2-fast\[demo\]'"):
        write_demo_images(tmp_path / "cells")
    assert os.listdir(tmp_path) == []


def names(folder: Path, split: str) -> set[str]:
    return set(find_images(folder, split).paths)


def test_class_folders_are_split_three_to_one_and_an_image_more_moves_no_other(tmp_path):
    for name, count in (("a", 8), ("b", 12)):
        write_images(tmp_path / "mine" / name / "deeper", count)
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    out = split_images(tmp_path / "mine", tmp_path / "data")
    train, test = find_images(out, "train"), find_images(out, "test")
    assert out == tmp_path / "data" and train.classes == test.classes == ["a", "b"]
    assert [images.labels.count(0) for images in (train, test)] == [6, 2]
    assert [images.labels.count(1) for images in (train, test)] == [9, 3]
    assert set(train.paths) | set(test.paths) == set(find_images(tmp_path / "mine").paths)
    assert (out / "test" / test.paths[0]).samefile(tmp_path / "mine" / test.paths[0])  # no second copy of the bytes
    assert split_images(tmp_path / "mine", out) == out
    shutil.copy(tmp_path / "mine" / "a" / "deeper" / "00.png", tmp_path / "mine" / "a" / "new.png")
    with pytest.raises(UserError, match="holds other images"):
        split_images(tmp_path / "mine", out)
    again = split_images(tmp_path / "mine", tmp_path / "again")
    assert names(again, "train") - {"a/new.png"} == names(out, "train")


def test_images_without_classes_are_split_too_and_a_split_stays_as_it_is(tmp_path):
    write_images(tmp_path / "mine", 8)
    out = split_images(tmp_path / "mine", tmp_path / "data")
    assert [len(names(out, split)) for split in ("train", "test")] == [6, 2] and find_images(out, "test").labels is None
    assert split_images(out, tmp_path / "other") == out and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["train/a", "train/b"], "nothing to be tested on"),
        (["train/a", "train/b", "test/a"], r"train has the classes \['a', 'b'\], test has \['a'\]"),
        (["val/a"], "nothing for train"),
    ],
)
def test_half_a_split_is_a_mistake_that_is_told_before_anything_is_made(tmp_path, places, said):
    for place in places:
        write_images(tmp_path / "mine" / place, 2)
    with pytest.raises(UserError, match=said):
        split_images(tmp_path / "mine", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_class_of_one_image_is_named(tmp_path):
    write_images(tmp_path / "mine" / "a", 4)
    write_images(tmp_path / "mine" / "lonely", 1)
    with pytest.raises(UserError, match="lonely has one image"):
        split_images(tmp_path / "mine", tmp_path / "data")
