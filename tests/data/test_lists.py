"""Index files: the data set of the folder that they list, and nothing outside it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import TokenizerView
from beitv2_fast.errors import DataError

from .test_shards import png

FILES = {"n02/a.png": "n02", "n02/b c.png": "n02", "n10/a.png": "n10", "n10/deep/d.PNG": "n10"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, path in enumerate(FILES):
        file = tmp_path / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    return tmp_path / "images"


def listed(folder: Path, lines: list[str], name: str = "list.txt") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def references(files: dict[str, str]) -> list[str]:
    classes = dict.fromkeys(reversed(files.values()))
    names = {c: [path.split("/", 1)[1] for path, of in files.items() if of == c] for c in classes}
    return [json.dumps({"class": c, "files": names[c]}) for c in classes]


FORMATS = {
    "tabs": lambda files: [f"{path}\t{name}" for path, name in files.items()],
    "spaces": lambda files: [f"{path} {name}" for path, name in files.items()],
    "paths": lambda files: ["", *files, ""],
    "the reference's": references,
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_list_in_any_order_is_the_folder_with_the_same_views(folder, form):
    lines = FORMATS[form](FILES)
    random.Random(1).shuffle(lines)
    images = check_images(find_images(listed(folder, lines), "train", labeled=True), cache=None, min_size=8, workers=0)
    plain = find_images(folder)
    assert (images.root, images.paths, images.labels, images.classes) == (
        plain.root, plain.paths, plain.labels, plain.classes,
    )  # fmt: skip
    assert images.fingerprint == plain.fingerprint
    assert "2 classes (n02, n10), listed by list.txt in" in images.summary
    views = [ImageFolder(found, TokenizerView(16), seed=2) for found in (images, plain)]
    options = {"batch_size": 4, "seed": 3, "total_steps": 3}
    for one, other in zip(*(train_loader(view, **options) for view in views), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_classes_of_a_list_are_its_own_and_numbers_are_the_labels(folder):
    paths = list(FILES)
    images = find_images(listed(folder, [f"{paths[0]}\tred fox", f"{paths[2]}\tantelope"], "a.tsv"))
    assert (images.paths, images.classes, images.labels) == ([paths[0], paths[2]], ["antelope", "red fox"], [1, 0])
    images = find_images(listed(folder, [f"{paths[0]} 10", f"{paths[2]} 2"]))
    assert (images.labels, images.classes) == ([10, 2], [str(i) for i in range(11)])
    images = find_images(listed(folder, [f"{paths[0]} 01", f"{paths[2]} 1", f"{paths[3]} 99999999999"]))
    assert images.classes == ["01", "1", "99999999999"]


def test_images_without_a_class_are_named_where_classes_are_needed(folder):
    (folder / "loose.png").write_bytes(png(7))
    file = listed(folder, ["loose.png", *FILES])
    assert find_images(file).labels is None and len(find_images(file)) == 5
    images = find_images(file, labeled=True)
    assert len(images) == 4 and images.rejected == [("loose.png", "no label: its line names no class")]


def test_no_path_of_a_list_leads_out_of_its_folder(folder):
    (folder.parent / "secret.png").write_bytes(png(9))
    (folder.parent / "secrets").mkdir()
    (folder.parent / "secrets" / "x.png").write_bytes(png(9))
    (folder / "n02" / "link.png").symlink_to("../../secret.png")
    (folder / "out").symlink_to("../secrets")
    (folder / "n10" / "in.png").symlink_to("../n02/a.png")
    reasons = {
        "../secret.png": "a path that leads out",
        "n02/../../secret.png": "a path that leads out",
        f"{folder.parent}/secret.png": "an absolute path",
        "C:/secret.png": "an absolute path",
        "n02\\..\\secret.png": "a path with a backslash or a control character",
        "n02/link.png": "a link that leads out of the folder",
        "out/x.png": "a link that leads out of the folder",
        "n02/a.png": "listed again, as of class n10",
        "n10/a.png": "listed again",
    }
    lines = [*FILES, "n10/in.png", *list(reasons)[:-2], "n02/a.png\tn10", "n10/a.png\tn10"]
    images = find_images(listed(folder, lines))
    assert images.paths == sorted([*FILES, "n10/in.png"])
    assert dict(images.rejected) == reasons
    with pytest.raises(DataError, match=r"lists no image that can be used.*\n.*secret.png: a path that leads out"):
        find_images(listed(folder, ["../secret.png"]))
    hostile = json.dumps({"class": "..", "files": ["secret.png"]})
    assert find_images(listed(folder, [hostile, *FILES])).rejected == [("../secret.png", "a path that leads out")]


def test_a_listed_file_that_is_missing_is_left_out_by_the_check(folder):
    images = find_images(listed(folder, [*FILES, "n02/gone.png"]))
    checked = check_images(images, cache=None, min_size=8, workers=0)
    assert checked.paths == list(FILES) and checked.rejected == [("n02/gone.png", "not a file, or gone")]


def test_a_list_may_be_a_link_in_the_folder_that_it_lists(folder):
    (folder.parent / "lists").mkdir()
    file = listed(folder.parent / "lists", list(FILES), "in21k.json")
    (folder / "in21k.json").symlink_to(os.path.relpath(file, folder))
    assert find_images(folder / "in21k.json").paths == list(FILES)


@pytest.mark.parametrize(
    "line",
    ["notes", "notes.doc n02", "{", "{}", '{"class": "n02"}', '{"class": "n02", "files": 3}', "[" * 3, "\udcff"],
)
def test_a_line_that_is_not_understood_is_told_with_its_number(folder, line):
    file = folder / "list.txt"
    file.write_bytes("\n".join([*FILES, line]).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"list.txt is not understood after line [0-9] .*Expected the path of an image"):
        find_images(file)
