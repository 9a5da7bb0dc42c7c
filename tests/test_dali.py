"""DALI: the batches of the other loader, bit for bit on the CPU; the graph for GPUs, run on the CPU, close to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast.data import (
    EvalView,
    FinetuneView,
    ImageFolder,
    PretrainView,
    TokenizerView,
    choose_loader,
    find_images,
    train_loader,
)
from beitv2_fast.errors import UserError

from .test_against_torchvision import photographs

dali = pytest.importorskip("beitv2_fast.dali", reason="DALI is not installed (extra: dali)", exc_type=UserError)

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
        image.convert("L").save(root / f"grey{i}.jpg")
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
        scale = 0.226 if key == "student" and name != "pretrain, two sizes" else 1.0  # a level of a normalised channel
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


def test_auto_takes_dali_where_it_is_installed_and_there_is_something_to_decode(monkeypatch):
    assert choose_loader("auto")[0] == "dali" and choose_loader("auto")[1].startswith("DALI ")
    assert choose_loader("auto", in_memory=True)[0] == "torchvision"
    assert choose_loader("torchvision")[0] == "torchvision"
    with pytest.raises(UserError, match="--in-memory keeps decoded images"):
        choose_loader("dali", in_memory=True)


def test_draws_reach_the_pipeline_in_dali_s_order():
    view = TokenizerView(8)
    draws = {"box": np.array([[1, 2, 11, 22]]), "flip": np.array([True])}
    fed = dali.inputs(view, np.array([[50, 60]]), draws, whole_graph=True)
    assert fed["start"].tolist() == [[1, 2]] and fed["shape"].tolist() == [[10, 20]]
    assert fed["height"].tolist() == [20.0] and fed["flip"].tolist() == [1]
