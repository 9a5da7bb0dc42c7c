"""Arrow and Parquet files of Hugging Face's datasets: the images of a folder, read in place."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images, held_out_images
from beitv2_fast.data.images import ImageFolder, ImageList
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import TokenizerView
from beitv2_fast.downstream.evaluation import columns_of
from beitv2_fast.errors import DataError

from .test_shards import png

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra: datasets)")
pyarrow = pytest.importorskip("pyarrow")
CLASSES = ["tench", "goldfish", "ant"]  # in another order than the alphabet's
LABELS = [0, 1, 2, 0, 2, 1, 0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows(first: int = 0, count: int = 7, **columns: object) -> datasets.Dataset:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    values = {"image": [{"bytes": png(first + i), "path": None} for i in range(count)], "label": LABELS[:count]}
    return datasets.Dataset.from_dict(values, datasets.Features(features))


def saved(folder: Path, **options: object) -> Path:
    splits = datasets.DatasetDict({"train": rows(), "validation": rows(20, 2)})
    splits.save_to_disk(folder, **options)
    return folder


def parquet(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(2):
        part = rows().select(range(4) if i == 0 else range(4, 7))
        part.to_parquet(folder / f"train-0000{i}-of-00002.parquet")
    rows(20, 2).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


FORMATS = {
    "arrow": saved,
    "two arrow files": lambda folder: saved(folder, num_shards={"train": 2, "validation": 1}),
    "parquet": parquet,
}


@pytest.fixture
def plain(tmp_path) -> ImageList:
    """The same images as a folder, in the same order."""
    for i, label in enumerate(LABELS):
        file = tmp_path / "folder" / CLASSES[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    found = find_images(tmp_path / "folder")
    return found.subset([found.paths.index(f"{CLASSES[label]}/{i}.png") for i, label in enumerate(LABELS)])


@pytest.mark.parametrize("form", FORMATS)
def test_a_data_set_gives_the_batches_of_a_folder_with_the_same_images(tmp_path, plain, form):
    found = find_images(FORMATS[form](tmp_path / "set"), "train", labeled=True)
    images = check_images(found, cache=tmp_path / "images.json", min_size=8, workers=0)
    assert (images.labels, images.classes, images.rejected) == (LABELS, CLASSES, [])
    assert [images.read(i) for i in range(7)] == [png(i) for i in range(7)]
    views = [ImageFolder(pickle.loads(pickle.dumps(i)), TokenizerView(16), seed=2) for i in (images, plain)]
    options = {"batch_size": 3, "seed": 3, "total_steps": 5}
    for one, other in zip(*(train_loader(view, **options) for view in views), strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["index"], other["index"])
    held_out = held_out_images(tmp_path / "set")
    assert [held_out.read(i) for i in range(2)] == [png(20), png(21)]


def test_an_evaluation_finds_the_classes_by_their_names(tmp_path):
    images = find_images(saved(tmp_path / "set"), "val", labeled=True)
    assert columns_of(images, ["ant", "bee", "goldfish", "tench"], "set").tolist() == [3, 2, 0]


def test_parquet_is_unpacked_once_and_the_log_says_where(tmp_path, cache):
    folder = parquet(tmp_path / "set")
    images = find_images(folder, "train")
    assert images.root.is_relative_to(cache)
    assert f"unpacked from {folder}/train-00000-of-00002.parquet, ..., in {images.root}" in images.summary
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    again = find_images(f"{folder}/train-*.parquet")
    assert (again.root, again.fingerprint, again.spans) == (images.root, images.fingerprint, images.spans)
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert len(find_images(folder / "train-00001-of-00002.parquet")) == 3


def table(path: Path, columns: dict, options: object = None, form: str = "stream") -> Path:
    made = pyarrow.table(columns)
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new(str(path), made.schema, options=options) as writer:
        writer.write_table(made, max_chunksize=2)
    return path


def structs(*values: bytes | None) -> pyarrow.Array:
    kind = pyarrow.struct([("path", pyarrow.string()), ("bytes", pyarrow.large_binary())])
    return pyarrow.array([None if v is None else {"bytes": v, "path": "../secret.png"} for v in values], kind)


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_of_others_are_read_and_what_has_no_bytes_is_left_out(tmp_path, form):
    columns = {"id": [1, 2, 3], "jpg": structs(png(1), None, png(3)), "cls": ["dog", "cat", "cat"]}
    images = find_images(table(tmp_path / "a.arrow", columns, form=form))
    assert images.paths == ["a.arrow/0", "a.arrow/2"] and [images.read(i) for i in (0, 1)] == [png(1), png(3)]
    assert (images.labels, images.classes) == ([1, 0], ["cat", "dog"])
    assert images.rejected == [("a.arrow/1", "no bytes, only a path")]


def test_labels_are_numbers_texts_or_absent_and_minus_one_is_none(tmp_path):
    columns = {"image": [png(1), png(2), png(3)], "label": [4, -1, 0]}
    file = table(tmp_path / "a.arrow", columns)
    assert find_images(file).labels is None
    images = find_images(file, labeled=True)
    assert (images.labels, images.classes) == ([4, 0], ["0", "1", "2", "3", "4"])
    assert images.rejected == [("a.arrow/1", "no label: -1")]
    assert find_images(table(tmp_path / "b.arrow", {"image": [png(1)]}), labeled=True).labels is None


def test_columns_that_are_not_clear_are_told(tmp_path):
    both = {"image": [png(1)], "mask": [png(2)]}
    images = find_images(table(tmp_path / "a.arrow", both))
    assert images.read(0) == png(1)
    with pytest.raises(DataError, match="has the columns left, right: it is not clear"):
        find_images(table(tmp_path / "b.arrow", {"left": [png(1)], "right": [png(2)]}))
    with pytest.raises(DataError, match="has the columns path, label: it is not clear"):
        find_images(table(tmp_path / "c.arrow", {"path": ["a.png"], "label": [1]}))


def test_damaged_and_compressed_files_are_left_out_by_name(tmp_path):
    table(tmp_path / "a.arrow", {"image": [png(1), png(2)]})
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.arrow").write_bytes(b"no Arrow file")
    table(tmp_path / "d.arrow", {"image": [png(5) * 9]}, pyarrow.ipc.IpcWriteOptions(compression="zstd"))
    (tmp_path / "cache-123.arrow").write_bytes(b"what datasets computed")
    images = find_images(tmp_path)
    assert images.paths == ["a.arrow/0", "a.arrow/1"]
    reasons = dict(images.rejected)
    assert "not an Arrow file as a whole" in reasons.pop("b.arrow") and "not an Arrow file" in reasons.pop("c.arrow")
    assert reasons == {"d.arrow/0": "compressed: save the data set without compression"}
    (tmp_path / "e.parquet").write_bytes(b"no Parquet file")
    with pytest.raises(DataError, match=r"has files ending in .arrow and in .parquet"):
        find_images(tmp_path)
    with pytest.raises(DataError, match=r"cannot be read as Parquet files"):
        find_images(tmp_path / "e.parquet")


def test_files_of_other_classes_are_not_one_data_set(tmp_path):
    saved(tmp_path / "one")
    other = rows().cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    other.save_to_disk(tmp_path / "two")
    for i, folder in enumerate(("one/train", "two")):
        next((tmp_path / folder).glob("*.arrow")).rename(tmp_path / f"{i}.arrow")
    with pytest.raises(DataError, match=r"1.arrow has other classes than .*0.arrow. Pass the files of one data set"):
        find_images(tmp_path / "*.arrow")
