"""DALI: the batches of the other loader, bit for bit on the CPU; the graph for GPUs, run on the CPU, close to them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import choose_loader, keyed_loader, train_loader
from beitv2_fast.data.views import EvalView, FinetuneView, PretrainView, TokenizerView
from beitv2_fast.errors import UserError

from .test_against_torchvision import photographs

dali = pytest.importorskip("beitv2_fast.data.dali", reason="DALI is not installed (extra: dali)", exc_type=UserError)

KEYS = [(0, 0), (0, 1), (0, 2), (0, 1), (0, 2)]
BATCHES = [KEYS[:3], KEYS[3:]]
VIEWS = {
    "tokenizer": TokenizerView(96),
    "pretrain": PretrainView(96, 96, (6, 6), 14),
    "pretrain, two sizes": PretrainView(96, 48, (6, 6), 14, tokenizer_resample="lanczos"),
    "finetune": FinetuneView(96),
    "evaluation": EvalView(96),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs in every format that DALI decodes itself, and in some that are handed to PIL."""
    root = tmp_path_factory.mktemp("photographs")
    for i, image in enumerate(photographs()):
        image.save(root / f"{i}.jpg", quality=90)
        image.save(root / f"{i}.png")
        image.convert("L").save(root / f"gray{i}.jpg")
    image = next(photographs())
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.convert("P").save(root / "palette.png")
    image.convert("RGBA").save(root / "alpha.png")
    image.convert("L").convert("I;16").point(lambda v: v * 257).save(root / "deep.png")
    image.save(root / "progressive.jpg", progressive=True)
    for name in ("a.gif", "a.bmp", "a.webp", "a.tif"):
        image.save(root / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    for name in ("turned.jpg", "turned.png"):
        image.save(root / name, exif=exif)
    return find_images(root)


def batch_of(images, view, loader):
    dataset = ImageFolder(images, view, seed=5, loader=loader)
    (batch,) = train_loader(dataset, batch_size=len(images), total_steps=1)
    return batch


@pytest.mark.parametrize("name", VIEWS)
def test_both_loaders_make_the_same_batches_on_the_cpu(images, name):
    theirs, ours = (batch_of(images, VIEWS[name], loader) for loader in ("torchvision", "dali"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def pictures_on_gpu_graph(images, view):
    """What the loader for GPUs makes, on the CPU."""
    dataset = ImageFolder(images, view, seed=5, loader="dali")
    keys = [[(0, i) for i in range(first, min(first + 8, len(images)))] for first in range(0, len(images), 8)]
    return list(dali.DaliLoader(dataset, keys, 8, 2))


@pytest.mark.parametrize("name", ["tokenizer", "pretrain", "pretrain, two sizes", "evaluation"])
def test_the_graph_for_gpus_is_within_2_levels_but_at_the_crop_s_border(images, name):
    """Where the filter leaves the crop, DALI repeats the border pixel and PIL leaves it out of the sum."""
    view = VIEWS[name]
    if name == "pretrain":
        view = PretrainView(96, 96, (6, 6), 14, color_jitter=0.0)
    batches = pictures_on_gpu_graph(images, view)
    found = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    dataset = ImageFolder(images, view, seed=5)
    theirs = dataset.__getitems__([(0, i) for i in range(len(images))])
    for key, expected in theirs.items():
        if expected.dim() < 4:
            assert torch.equal(found[key], expected), key
            continue
        scale = 0.226 if key == "student" and name != "pretrain, two sizes" else 1.0  # a level of a normalized channel
        levels = (found[key] - expected).abs() * 255 * scale
        if name != "pretrain, two sizes" or key != "student":
            assert (levels > 2.1).float().mean() < 0.01
            border = 12
            assert (levels[..., border:-border, border:-border] > 2.1).float().mean() < 2e-4


def test_rand_augment_for_gpus_follows_from_the_key_and_changes_most_images(images):
    first, again = (pictures_on_gpu_graph(images, VIEWS["finetune"]) for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    plain = pictures_on_gpu_graph(images, FinetuneView(96, ops=0))
    differences = [(a["image"] - b["image"]).abs().flatten(1) for a, b in zip(first, plain, strict=True)]
    assert (torch.cat(differences).max(1).values > 0.02).float().mean() > 0.7


def test_the_loader_for_gpus_reads_ahead_and_keeps_the_order(images):
    dataset = ImageFolder(images, VIEWS["tokenizer"], seed=5, loader="dali")
    keys = [[(0, i)] for i in (3, 1, 2, 0, 4, 1)]
    loader = dali.DaliLoader(dataset, keys, 1, 3)
    assert len(loader) == 6
    assert [batch["index"].item() for batch in loader] == [3, 1, 2, 0, 4, 1]
    next(iter(loader))  # leaving in the middle is no error


def test_the_loader_for_gpus_names_an_image_that_broke(tmp_path):
    for i, image in enumerate(photographs()):
        image.save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:-900])
    dataset = ImageFolder(find_images(tmp_path), TokenizerView(32), loader="dali")
    with pytest.raises(UserError, match=r"2.jpg could be read when it was checked"):
        list(dali.DaliLoader(dataset, [[(0, i) for i in range(5)]], 5, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_graph_decodes_what_pil_decodes(images, kind):
    """decodable() hands plain files on as they are, and their sizes are right."""
    names = [i for i, path in enumerate(images.paths) if path.endswith(".jpg" if kind == "JPEG" else ".png")]
    for i in names:
        data, size = dali.decodable(images.read(i))
        assert size == images.open(i).size
        handed_on = bytes(data[:2]) != b"P6"
        assert handed_on == (not images.paths[i].startswith(("cmyk", "palette", "alpha", "deep", "turned")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def odd_files() -> dict[str, bytes]:
    """Files that PIL reads, turned by what only PIL reads or not as whole as DALI wants them; the plain ones first."""
    image, encoded = next(photographs()).resize((96, 80)), {}
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        image.save(file := io.BytesIO(), kind)
        encoded[kind] = file.getvalue()
    png, jpeg, exif = encoded["PNG"], encoded["JPEG"], exif.tobytes()
    start, end = png.index(b"IDAT") - 4, png.index(b"IEND") - 4
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    app1 = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    profile = f"\nexif\n{len(exif):8}\n{exif.hex()}".encode()
    turning = {
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "packed_xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        "exif": chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")),
        "profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
    }
    return {
        "plain.png": png,
        "plain.jpg": jpeg,
        "xmp.jpg": jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(app1)) + app1 + jpeg[2:],
        **{f"{name}_before.png": png[:start] + part + png[start:] for name, part in turning.items()},
        **{f"{name}_after.png": png[:end] + part + png[end:] for name, part in turning.items()},
        "no_end.png": png[:end],
        "half_an_end.png": png[:-6],
        "checksum.png": png[: end - 4] + bytes(4) + png[end:],
    }


@pytest.mark.parametrize("name", odd_files())
def test_a_file_that_the_check_lets_through_has_the_same_pixels_in_both_loaders(tmp_path, name):
    (tmp_path / name).write_bytes(odd_files()[name])
    images = check_images(find_images(tmp_path), cache=None, min_size=8, workers=0)
    turned = not name.startswith(("plain", "no_end", "half", "checksum"))
    assert images.open(0).size == ((80, 96) if turned else (96, 80))
    for view in (TokenizerView(32), EvalView(32)):
        theirs, ours = (batch_of(images, view, loader)["image"] for loader in ("torchvision", "dali"))
        assert torch.equal(theirs, ours)
    whole = torch.cat([batch["image"] for batch in pictures_on_gpu_graph(images, EvalView(32))])
    assert (whole - theirs).abs().max() * 255 < 2.1
    assert dali.decodable(images.read(0))[0][:2].tobytes() == (b"P6" if "plain" not in name else images.read(0)[:2])


@pytest.mark.parametrize("loader", (lambda f: dali.DaliLoader(f, BATCHES, 3, 1), lambda f: keyed_loader(f, KEYS, 3)))
def test_what_dali_refuses_though_pil_reads_it_is_decoded_by_pil_and_the_run_goes_on(
    tmp_path, monkeypatch, caplog, loader
):
    for name in ("plain.png", "no_end.png", "plain.jpg"):
        (tmp_path / name).write_bytes(odd_files()[name])
    monkeypatch.setattr(dali, "is_plain_png", lambda data: True)
    folder = ImageFolder(find_images(tmp_path), EvalView(32), loader="dali")
    expected = ImageFolder(folder.images, EvalView(32)).__getitems__(KEYS)["image"]
    found = torch.cat([batch["image"] for batch in loader(folder)])
    assert ((found - expected).abs() * 255 > 2.1).float().mean() < 0.01
    assert "DALI could not decode a batch (no_end.png, plain.jpg, plain.png, ...), so PIL does" in caplog.text


def test_auto_takes_dali_where_it_is_installed_and_there_is_something_to_decode(monkeypatch):
    assert choose_loader("auto")[0] == "dali" and choose_loader("auto")[1].startswith("DALI ")
    assert choose_loader("auto", in_memory=True)[0] == "torchvision"
    assert choose_loader("torchvision")[0] == "torchvision"
    with pytest.raises(UserError, match=r"--in-memory keeps decoded images.* Give --no-in-memory"):
        choose_loader("dali", in_memory=True)


def test_draws_reach_the_pipeline_in_dali_s_order():
    view = TokenizerView(8)
    draws = {"box": np.array([[1, 2, 11, 22]]), "flip": np.array([True])}
    fed = dali.inputs(view, np.array([[50, 60]]), draws, whole_graph=True)
    assert fed["start"].tolist() == [[1, 2]] and fed["shape"].tolist() == [[10, 20]]
    assert fed["height"].tolist() == [20.0] and fed["flip"].tolist() == [1]
