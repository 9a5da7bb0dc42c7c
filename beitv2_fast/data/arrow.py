"""Data sets of Hugging Face's ``datasets``: Arrow files, as save_to_disk writes them, and Parquet files.

An Arrow file holds the encoded images as they are, so they are read in place, like members of a tar shard. Parquet
packs them: ``datasets`` unpacks the files, once, into Arrow files in its cache.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, require
from .images import ImageList
from .names import MAX_CLASSES, PassedOver
from .shards import image_list

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # which holds the images, if several hold bytes
LABEL_COLUMNS = ("label", "labels", "cls")


def find_arrow_images(files: list[Path], *, labeled: bool = False, beside: PassedOver | None = None) -> ImageList:
    """The images of Arrow or Parquet files, in the order of files and rows; the path of one is FILE/ROW.

    They are in the column of bytes or of ``datasets.Image``. The classes are those of the column of ``ClassLabel``;
    else the values of a column in LABEL_COLUMNS: numbers are the labels, texts are sorted.

    Args:
        labeled, beside: see ``find_shard_images``.

    Raises:
        DataError: no column, or more than one, may be the images; the files have other classes; there is no image.
    """
    packed = files[0].suffix == ".parquet"
    found = [path.resolve() for path in (_unpacked(files) if packed else files)]
    root = Path(os.path.commonpath([path.parent for path in found]))
    scanned: dict[str, dict[str, Any]] = {}
    classes: dict[Path, list[str] | None] = {}  # of each file with images
    for path in found:
        members, rejected, names = _scan(path)
        if members:
            classes[path] = names
        scanned[path.relative_to(root).as_posix()] = {"members": members, "rejected": rejected, "passed_over": {}}
    for path, names in classes.items():
        if names != next(iter(classes.values())):
            raise DataError(f"{path} has other classes than {next(iter(classes))}. Pass the files of one data set.")
    texts = sorted({label for found in scanned.values() for *_, label, _ in found["members"] if isinstance(label, str)})
    if texts:
        number = {text: i for i, text in enumerate(texts)}
        for shard in scanned.values():
            shard["members"] = [(*place, number.get(label), why) for *place, label, why in shard["members"]]
    images = image_list(root, scanned, labeled, beside or {})
    names = (texts or next(iter(classes.values())) or images.classes) if images.labels is not None else []
    layout = f"unpacked from {files[0]}{', ...' if len(files) > 1 else ''}," if packed else "Arrow files"
    return replace(images, classes=names, layout=layout)


def _unpacked(files: list[Path]) -> list[Path]:
    """The Arrow files that ``datasets`` keeps of these Parquet files in its cache."""
    datasets = require("datasets", "datasets", "Reading Parquet files")
    try:
        rows = datasets.load_dataset("parquet", data_files=[str(path.resolve()) for path in files], split="train")
    except OSError:
        raise
    except Exception as error:  # its own wrap pyarrow's
        raise DataError(f"{files[0].parent} cannot be read as Parquet files: {error.__cause__ or error}") from error
    return [Path(file["filename"]) for file in rows.cache_files]


def _scan(path: Path) -> tuple[list[tuple], list[tuple[str, str]], list[str] | None]:
    """-> (row, first byte, number of bytes, label, why it has none) of the images, what was refused, and the names of
    the classes, None if the labels have none."""
    pyarrow = require("pyarrow", "datasets", "Reading Arrow files")
    ipc = require("pyarrow.ipc", "datasets", "Reading Arrow files")
    whole = pyarrow.memory_map(str(path)).read_buffer()
    try:
        open_it = ipc.open_file if whole[:6] == b"ARROW1" else ipc.open_stream
        table = open_it(whole, options=ipc.IpcReadOptions(use_threads=False)).read_all()
        images, label, names = _columns(table.schema, path)
        encoded = table.column(images)
        encoded.validate(full=True)
        labels = [None] * len(table) if label is None else table.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        return [], [("", f"not an Arrow file as a whole ({error})")], None
    members, rejected = [], []
    places = itertools.chain.from_iterable(_places(chunk, whole) for chunk in encoded.chunks)
    for row, (value, place) in enumerate(zip(labels, places, strict=True)):
        if place is None:
            rejected.append((str(row), "no bytes, only a path"))
        elif place[0] < 0 or sum(place) > whole.size:
            rejected.append((str(row), "compressed: save the data set without compression"))
        else:
            members.append((str(row), *place, *_label(value, names)))
    return members, rejected, names


def _places(chunk: Any, whole: Any) -> Iterator[tuple[int, int] | None]:
    """(First byte in the file, number of bytes) of each image in a part of their column; None if it has no bytes."""
    if isinstance(chunk.type, require("pyarrow", "datasets", "Reading Arrow files").StructType):
        chunk = chunk.flatten()[chunk.type.get_field_index("bytes")]
    _, offsets, values = chunk.buffers()
    width = np.int64 if "large" in str(chunk.type) else np.int32
    ends = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
    firsts = ends[:-1] + (0 if values is None else values.address - whole.address)
    columns = firsts.tolist(), np.diff(ends).tolist(), chunk.is_null().to_pylist()
    for first, length, missing in zip(*columns, strict=True):
        yield None if missing else (first, length)


def _columns(schema: Any, path: Path) -> tuple[str, str | None, list[str] | None]:
    """The columns of the images and of the labels, if there is one, and the names of the classes."""
    types = require("pyarrow", "datasets", "Reading Arrow files").types
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and holds_bytes(kind.field(place).type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    images = [name for name in images if name in IMAGE_COLUMNS] if len(images) > 1 else images
    if len(images) != 1:
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}: it is not clear which holds the images. Expected one "
            f"of encoded images (bytes), or of several one that is named {IMAGE_COLUMNS[0]}."
        )
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    labels = labels if len(labels) == 1 else [name for name in schema.names if name in LABEL_COLUMNS]
    label = labels[0] if len(labels) == 1 else None
    return images[0], label, features.get(label, {}).get("names")


def _label(value: Any, names: list[str] | None) -> tuple[int | str | None, str | None]:
    """(The label, None), or (None, why there is none)."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, str) or (number and 0 <= value < (MAX_CLASSES if names is None else len(names))):
        return value, None
    return None, "no column of labels" if value is None else f"no label: {str(value)[:80]}"
