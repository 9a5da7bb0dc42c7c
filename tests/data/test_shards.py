"""Tar shards: read in place, sampled as folders are, hostile members refused and listed."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile

import pytest
import torch
from PIL import Image

from beitv2_fast.data import shards
from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import TokenizerView
from beitv2_fast.errors import DataError

from .test_images import entries

CONTENTS = {}


def png(seed, size=(40, 32)):
    if (seed, size) not in CONTENTS:
        file = io.BytesIO()
        pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
        Image.frombytes("RGB", size, pixels).save(file, "PNG")
        CONTENTS[seed, size] = file.getvalue()
    return CONTENTS[seed, size]


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """members: (name, content) or TarInfo without content"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards of four images with labels, and the same images as a folder."""
    for s in range(3):
        members = []
        for i in range(4):
            name, content = f"{s}_{i}", png(4 * s + i)
            members += [(f"{name}.png", content), (f"{name}.cls", str(i % 2).encode())]
            path = tmp_path / "folder" / str(i % 2) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        write_tar(tmp_path / "shards" / f"train-{s:03}.tar", members)
    return tmp_path


@pytest.fixture(params=["torchvision", "dali"])
def loader(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra: dali)")
    return request.param


def test_images_and_labels_are_found_in_the_order_of_the_shards(folder):
    images = find_images(folder / "shards")
    assert images.paths == [f"train-00{s}.tar/{s}_{i}.png" for s in range(3) for i in range(4)]
    assert (images.labels, images.classes) == ([0, 1] * 6, ["0", "1"])
    assert [images.read(i) for i in range(12)] == [png(i) for i in range(12)]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("shards/train-{000..001}.tar", 8),
        ("shards/train-00[02].tar", 8),
        ("shards/*.tar", 12),
        ("shards/train-001.tar", 4),
    ],
)
def test_data_may_be_a_pattern_or_one_shard(folder, pattern, count):
    assert len(find_images(folder / pattern, "train")) == count


def test_the_split_s_folder_of_shards_is_used(folder):
    (folder / "set").mkdir()
    (folder / "shards").rename(folder / "set" / "train")
    assert len(find_images(folder / "set", "train")) == 12


def test_a_pattern_without_files_is_explained(folder):
    with pytest.raises(DataError, match="No file matches the pattern"):
        find_images(folder / "shards" / "val-*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_batches_of_a_folder_with_the_same_images(folder, workers, loader):
    shard_images = check_images(find_images(folder / "shards"), cache=None, min_size=8, workers=workers)
    folder_images = find_images(folder / "folder")
    order = [folder_images.paths.index(f"{i % 2}/{s}_{i}.png") for s in range(3) for i in range(4)]
    options = {"batch_size": 4, "seed": 3, "total_steps": 7, "workers": workers}
    views = [
        ImageFolder(images, TokenizerView(16), seed=2, loader=loader)
        for images in (shard_images, folder_images.subset(order))
    ]
    for one, other in zip(*(train_loader(view, **options) for view in views), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_labels_come_from_cls_or_json_and_need_every_image(tmp_path):
    members = [("a.b/x.png", png(0)), ("a.b/x.json", b'{"label": 2}'), ("y.png", png(1)), ("y.cls", b" 0\n")]
    images = find_images(write_tar(tmp_path / "a.tar", members))
    assert (images.labels, images.classes) == ([2, 0], ["0", "1", "2"])
    for bad in (b"", b"cat", b"-1", b"1.5", b"[" * 100_000, b'{"label": "cat"}', b"true", b"2147483647"):
        path = write_tar(tmp_path / "b.tar", [*members, ("z.png", png(2)), ("z.cls", bad)])
        assert find_images(path).labels is None, bad


def labeled(path, members, labeled=True):
    """{member: label} of the images that are read with their labels, {member: reason} of those left out."""
    images = find_images(write_tar(path, members), labeled=labeled)
    names = [name.partition("/")[2] for name in images.paths]
    reasons = {name.partition("/")[2]: why for name, why in images.rejected}
    return dict(zip(names, images.labels or [None] * len(names), strict=True)), reasons


def test_dots_in_the_names_of_members_do_not_mix_their_labels(tmp_path):
    members = []
    for i in range(3):
        members += [(f"2024.05.0{i}.png", png(i)), (f"2024.05.0{i}.cls", str(i).encode())]
    found, _ = labeled(tmp_path / "a.tar", members)
    assert found == {f"2024.05.0{i}.png": i for i in range(3)}
    del members[5]  # the label of the last
    found, reasons = labeled(tmp_path / "b.tar", members)
    assert found == {"2024.05.00.png": 0, "2024.05.01.png": 1}
    assert reasons == {"2024.05.02.png": "no label: there is no b.tar/2024.05.02.cls"}


def test_a_label_of_webdatasets_key_is_that_of_the_only_image_that_begins_so(tmp_path):
    members = [("a.input.png", png(0)), ("a.cls", b"4"), ("b.png", png(1)), ("b.cls", b"5")]
    assert labeled(tmp_path / "a.tar", members)[0] == {"a.input.png": 4, "b.png": 5}
    members += [("b.seg.png", png(2)), ("c.1.png", png(3)), ("c.2.png", png(4)), ("c.cls", b"6")]
    found, reasons = labeled(tmp_path / "b.tar", members)
    assert found == {"a.input.png": 4, "b.png": 5}
    assert reasons.keys() == {"b.seg.png", "c.1.png", "c.2.png"}
    summary = find_images(tmp_path / "b.tar").summary
    assert "1 of them have another one's key with something added (b.tar/b.seg.png)" in summary
    assert "labels without an image (1: b.tar/c.cls)" in summary


def test_two_labels_of_one_key_are_none_unless_they_agree(tmp_path):
    members = [("x.png", png(0)), ("x.cls", b"3"), ("x.json", b'{"label": 5}')]
    members += [("y.png", png(1)), ("y.cls", b"2"), ("y.json", b'{"label": 2}')]
    members += [("z.png", png(2)), ("z.cls", b"1"), ("z.json", b'{"author": "someone"}')]
    found, reasons = labeled(tmp_path / "a.tar", members)
    assert found == {"y.png": 2, "z.png": 1}
    assert reasons == {"x.png": "no single label: 3 in x.cls and 5 in x.json"}


def test_several_images_of_one_key_are_all_read_and_said(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.png", png(0)), ("x.jpg", png(1)), ("x.cls", b"3"), ("y.png", png(2))])
    assert find_images(path, labeled=True).labels == [3, 3]
    assert "; 2 of them share their key with another one (a.tar/x.png): all are read" in find_images(path).summary


def test_one_image_without_a_label_is_named_and_does_not_take_the_others_labels(tmp_path):
    members = [
        ("a.png", png(0)),
        ("a.cls", b"0"),
        ("b.png", png(1)),
        ("b.cls", b"1"),
        ("c.png", png(2)),
        ("c.cls", b"cat"),
    ]
    found, reasons = labeled(tmp_path / "a.tar", members)
    assert found == {"a.png": 0, "b.png": 1} and reasons == {"c.png": "no label: c.cls holds no class number"}
    images = find_images(tmp_path / "a.tar")  # a pre-training needs no labels: it keeps the image
    assert len(images) == 3 and images.labels is None and images.rejected == []
    assert "labels, since not every image has one (2: a.tar/c.png: no label: c.cls holds" in images.summary


def test_what_a_mac_leaves_in_a_shard_and_other_members_are_counted_and_passed_over(tmp_path):
    members = []
    for i in range(2):
        members += [(f"./._{i}.png", b"AppleDouble"), (f"./{i}.png", png(i)), (f"./._{i}.cls", b"x")]
        members += [(f"{i}.cls", str(i).encode()), (f"{i}.txt", b"a caption"), (f"__MACOSX/{i}.png", png(7))]
        members += [(f"PaxHeaders.3/{i}.png", png(8))]
    found, reasons = labeled(tmp_path / "a.tar", members)
    assert found == {"./0.png": 0, "./1.png": 1} and reasons == {}
    summary = find_images(tmp_path / "a.tar").summary
    assert "hidden members and what systems leave (8: a.tar/./._0.cls, ...)" in summary
    assert "members ending in .txt (2: a.tar/0.txt, ...)" in summary


def test_an_index_of_an_earlier_version_is_made_anew(tmp_path):
    path, index = write_tar(tmp_path / "a.tar", [("a.b.png", png(0)), ("a.b.cls", b"1")]), tmp_path / "shards.json"
    find_images(path, index=index)
    content = json.loads(index.read_text())
    (entry,) = content["shards"].values()
    entry["members"][0][3] = 0
    index.write_text(json.dumps({**content, "version": 1}))
    assert find_images(path, index=index).labels == [1]


def test_shards_of_several_splits_in_one_folder_are_told_apart_by_their_names(tmp_path):
    for i, name in enumerate(("imagenet-train-0", "imagenet-train-1", "imagenet-validation-0", "extra")):
        write_tar(tmp_path / f"{name}.tar", [(f"{i}.png", png(i))])
    train = find_images(tmp_path, "train")
    assert train.paths == ["imagenet-train-0.tar/0.png", "imagenet-train-1.tar/1.png"]
    assert "other shards (2: extra.tar, ...)" in train.summary
    assert find_images(tmp_path, "val").paths == ["imagenet-validation-0.tar/2.png"]
    assert len(find_images(tmp_path)) == len(find_images(tmp_path / "*.tar", "train")) == 4
    with pytest.raises(DataError, match="but nothing for test"):
        find_images(tmp_path, "test")


def test_a_shard_beside_class_folders_does_not_hide_them_and_equals_are_refused(folder):
    write_tar(folder / "folder" / "backup.tar", [("old.png", png(90))])
    images = find_images(folder / "folder", "train")
    assert images.classes == ["0", "1"] and len(images) == 12
    assert "files ending in .tar (1: backup.tar)" in images.summary
    write_tar(folder / "folder" / "more.tar", [("older.png", png(91))])
    with pytest.raises(DataError, match=r"as many .tar files \(backup.tar, ...\) as folders .* \(0, ...\).*\*.tar'"):
        find_images(folder / "folder", "train")
    assert len(find_images(folder / "folder" / "*.tar")) == 2
    (folder / "shards" / "samples").mkdir()
    (folder / "shards" / "samples" / "a.png").write_bytes(png(3))
    images = find_images(folder / "shards")
    assert len(images) == 12 and "folders and images beside the shards (1: samples)" in images.summary


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_hostile_members_are_refused_and_listed(tmp_path):
    hostile = {
        "/etc/cron.png": "an absolute path",
        "C:/windows.png": "an absolute path",
        "../escape.png": "a path that leads out",
        "a/../../escape.png": "a path that leads out",
        "a\\..\\escape.png": "backslash",
        "line\nbreak.png": "control character",
        "../escape.cls": "a path that leads out",
    }
    links = [
        special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.png", tarfile.LNKTYPE, "good.png"),
        special("pipe.png", tarfile.FIFOTYPE),
        special("device.png", tarfile.CHRTYPE),
        special("folder", tarfile.DIRTYPE),
    ]
    members = [("good.png", png(0)), *((name, png(1)) for name in hostile), *links, ("good.png", png(2))]
    images = find_images(write_tar(tmp_path / "x.tar", [*members, ("./also.good.png", png(3)), ("archive.zip", b"PK")]))
    assert images.paths == ["x.tar/good.png", "x.tar/./also.good.png"]
    assert images.read(0) == png(0)
    reasons = dict(images.rejected)
    for name, words in hostile.items():
        assert words in reasons.pop(f"x.tar/{name}")
    assert {name: reasons.pop(f"x.tar/{name}.png") for name in ("link", "hard", "pipe", "device")} == dict.fromkeys(
        ("link", "hard", "pipe", "device"), "not a regular file"
    )
    assert reasons == {"x.tar/good.png": "a name that comes twice"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]  # nothing was unpacked


def test_bombs_empty_and_damaged_members_are_left_out_by_the_check(tmp_path, monkeypatch):
    members = [("good.png", png(0)), ("empty.png", b""), ("text.jpg", b"no image"), ("cut.png", png(1)[:900])]
    members += [("bomb.png", png(2, (200, 100)))]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150 * 100)
    images = check_images(find_images(write_tar(tmp_path / "x.tar", members)), cache=None, min_size=8, workers=0)
    assert images.paths == ["x.tar/good.png"] and images.read(0) == png(0)
    reasons = {name.removeprefix("x.tar/"): why for name, why in images.rejected}
    assert reasons.keys() == {"empty.png", "text.jpg", "cut.png", "bomb.png"}
    assert reasons["bomb.png"] == "more than 15,000 pixels" and reasons["empty.png"] == "an empty file"


def test_a_shard_that_is_cut_keeps_its_whole_images(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", png(1))])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[1].offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    images = find_images(path)
    assert images.paths == ["x.tar/a.png"]
    assert "cut off" in str(images.rejected) or "as a whole" in str(images.rejected)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, gzip.compress(b"x" * 5000)])
def test_what_is_no_tar_is_listed_and_alone_an_error(folder, content):
    (folder / "shards" / "train-009.tar").write_bytes(content)
    images = find_images(folder / "shards")
    assert len(images) == 12
    assert not images.rejected or images.rejected[0][0] == "train-009.tar"
    with pytest.raises(DataError, match=r"The 1 shards in .* hold no images"):
        find_images(folder / "shards" / "train-009.tar")


def test_a_negative_size_does_not_send_the_reader_round_and_round(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", png(1))])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[1].offset
    data[at + 124 : at + 136] = (-(2**20)).to_bytes(12, "big", signed=True)  # base-256, as GNU tar writes large sizes
    header = bytearray(data[at : at + 512])
    header[148:156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(data)
    images = find_images(path)
    assert images.paths == ["x.tar/a.png"] and images.rejected


def test_the_index_is_made_once_and_again_for_a_shard_that_changed(folder, monkeypatch):
    index, scanned = folder / "run" / "shards.json", []
    original = shards.scan_shard
    monkeypatch.setattr(shards, "scan_shard", lambda path: scanned.append(path.name) or original(path))
    first = find_images(folder / "shards", index=index)
    assert sorted(scanned) == ["train-000.tar", "train-001.tar", "train-002.tar"]
    scanned.clear()
    assert find_images(folder / "shards", index=index) == first and scanned == []
    write_tar(folder / "shards" / "train-001.tar", [("new.png", png(50)), ("new.cls", b"1")])
    assert len(find_images(folder / "shards", index=index)) == 9 and scanned == ["train-001.tar"]
    index.write_text("{")
    assert len(find_images(folder / "shards", index=index)) == 9


def test_a_check_is_repeated_only_for_a_shard_that_changed(folder):
    cache = folder / "run" / "images.jsonl"
    check_images(find_images(folder / "shards"), cache=cache, min_size=8, workers=0)
    before = entries(cache)
    write_tar(folder / "shards" / "train-001.tar", [("1_0.png", png(50))])
    check_images(find_images(folder / "shards"), cache=cache, min_size=8, workers=0)
    after = entries(cache)
    assert after["train-000.tar/0_0.png"] == before["train-000.tar/0_0.png"]
    assert after["train-001.tar/1_0.png"] != before["train-001.tar/1_0.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_shrinks_during_training_is_an_error_that_names_the_image(folder, loader, workers):
    dataset = ImageFolder(find_images(folder / "shards"), TokenizerView(16), loader=loader)
    path = folder / "shards" / "train-002.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"train-002.tar/2_\d.png could be read when it was checked"):
        list(train_loader(dataset, batch_size=4, total_steps=3, workers=workers))
