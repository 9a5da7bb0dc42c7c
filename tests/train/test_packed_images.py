"""Packed data sets become folders, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from beitv2_fast.errors import UserError
from beitv2_fast.train.experiments.packed_images import unpacked


def pack(file: Path, **values: object) -> Path:
    np.savez(file, **values)
    return file


def joined(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def test_labeled_images_lie_in_the_folders_of_their_classes(tmp_path):
    data, offsets = joined([b"first", b"second", b"third"])
    values = {"train_data": data, "train_offsets": offsets, "train_labels": np.array([1, 0, 1]), "classes": ["a", "b"]}
    folder = unpacked(pack(tmp_path / "pack.npz", **values), tmp_path / "images")
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.jpg")}
    assert found == {"train/b/00000.jpg": b"first", "train/a/00001.jpg": b"second", "train/b/00002.jpg": b"third"}
    (folder / "train/a/00001.jpg").write_bytes(b"touched")
    assert unpacked(tmp_path / "pack.npz", folder) == folder
    assert (folder / "train/a/00001.jpg").read_bytes() == b"touched"  # not written again


def test_scenes_have_images_and_masks_of_the_same_names(tmp_path):
    (data, offsets), (masks, mask_offsets) = joined([b"one", b"two"]), joined([b"mask 1", b"mask 2"])
    values = {"val_data": data, "val_offsets": offsets, "val_annot": masks, "val_annot_offsets": mask_offsets}
    folder = unpacked(pack(tmp_path / "pack.npz", **values), tmp_path / "scenes")
    assert [p.read_bytes() for p in sorted((folder / "val/images").iterdir())] == [b"one", b"two"]
    assert (folder / "val/masks/00001.png").read_bytes() == b"mask 2"


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert unpacked(tmp_path, tmp_path / "images") == tmp_path
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_what_is_neither_is_refused_by_its_name(tmp_path, content):
    file = tmp_path / "other.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.npz is neither a folder"):
        unpacked(file, tmp_path / "images")


def test_a_pack_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a folder"):
        unpacked(pack(tmp_path / "other.npz", something=np.zeros(3)), tmp_path / "images")


@pytest.mark.parametrize("name", ["../outside", "..", "/absolute", "back\\slash", ""])
def test_the_name_of_a_class_cannot_leave_the_folder(tmp_path, name):
    data, offsets = joined([b"first"])
    values = {"train_data": data, "train_offsets": offsets, "train_labels": np.array([0]), "classes": [name]}
    with pytest.raises(UserError, match="cannot be the folder of a class"):
        unpacked(pack(tmp_path / "pack.npz", **values), tmp_path / "inner" / "images")
    assert not list(tmp_path.rglob("*.jpg"))
