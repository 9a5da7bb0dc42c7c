"""Data sets packed in one .npz file, written as folders that the commands read.

A pack holds the bytes of JPEG files one after another, ``SPLIT_data``, cut by ``SPLIT_offsets``, and either
``SPLIT_labels`` with ``classes``, or PNG masks, ``SPLIT_annot`` and ``SPLIT_annot_offsets``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beitv2_fast.errors import UserError, require
from beitv2_fast.runs.files import write_atomically

PACKED_SPLITS = ("train", "val", "test")


def unpacked(source: Path, folder: Path, needed: bool = True) -> Path:
    """``source`` itself if it is a folder; else its pictures as ``folder``/SPLIT/CLASS/*.jpg, or with masks as
    ``folder``/SPLIT/images/*.jpg and ``folder``/SPLIT/masks/*.png. What is there already is not written again. Where
    the pictures are not ``needed`` they may be missing.

    Raises:
        UserError: there is no such file, it is no pack, or the name of a class would leave the folder.
    """
    if source.is_dir() or not (needed or source.exists()):
        return source
    finished = folder / ".unpacked"
    if finished.is_file() and finished.read_text() == str(source.resolve()):
        return folder
    np = require("numpy", "train", "Reading packed images")
    try:
        with np.load(source) as pack:
            splits = [split for split in PACKED_SPLITS if f"{split}_data" in pack]
            if not splits:
                raise KeyError("train_data")
            for split in splits:
                _write_split(pack, split, folder / split)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{source} is neither a folder of images nor a file of packed ones ({error}). Give a folder with "
            "train/CLASS and val/CLASS (of scenes: train/images, train/masks and the same in val)."
        ) from error
    write_atomically(finished, str(source.resolve()))
    return folder


def _write_split(pack: Any, split: str, folder: Path) -> None:
    images = _files(pack[f"{split}_data"], pack[f"{split}_offsets"])
    if f"{split}_annot" in pack:
        masks = _files(pack[f"{split}_annot"], pack[f"{split}_annot_offsets"])
        for kind, files, suffix in (("images", images, "jpg"), ("masks", masks, "png")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for i, data in enumerate(files):
                (folder / kind / f"{i:05d}.{suffix}").write_bytes(data)
        return
    classes = [str(name) for name in pack["classes"]]
    for name in classes:
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{name!r} cannot be the folder of a class")
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (data, label) in enumerate(zip(images, pack[f"{split}_labels"].tolist(), strict=True)):
        (folder / classes[label] / f"{i:05d}.jpg").write_bytes(data)


def _files(data: Any, offsets: Any) -> list[bytes]:
    return [data[a:b].tobytes() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
