"""`--loader gpu`: whole batches cut out of decoded images on the device are those of the torchvision loader."""

from __future__ import annotations

import collections
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from beitv2_fast.data import forks, stored, views
from beitv2_fast.data import images as images_module
from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import choose_loader, eval_loader, keyed_loader, train_loader
from beitv2_fast.data.stored_loader import StoredLoader
from beitv2_fast.data.views import EvalView, FinetuneView, PretrainView, TokenizerView
from beitv2_fast.errors import DataError, UserError

from ..support.training import write_images
from .test_against_torchvision import photographs

VIEWS = {
    "tokenizer": TokenizerView(48),
    "pretrain": PretrainView(48, 48, (6, 6), 14),
    "pretrain, two sizes, keys of masks": PretrainView(
        64, 48, (6, 6), 14, masks="device", tokenizer_resample="lanczos", color_jitter=0.0
    ),
    "finetune": FinetuneView(48, ops=0),
    "evaluation": EvalView(48),
}
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Of five sizes, in color and gray, in two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for name in ("color", "gray"):
        (root / name).mkdir()
    for i, image in enumerate(photographs()):
        image.save(root / "color" / f"{i}.png")
        image.convert("L").save(root / "gray" / f"{i}.png")
    return check_images(find_images(root), cache=None, min_size=8, workers=0)


def batches(images, view, loader, **options):
    dataset = ImageFolder(images, view, seed=5, loader=loader)
    return list(train_loader(dataset, **{"batch_size": 4, "total_steps": 5, "seed": 5, **options}))


def levels(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> torch.Tensor:
    """The difference of pixels in levels of uint8; a student's are divided by ImageNet's deviation."""
    return (ours - theirs).abs() * 255 * (0.226 if name == "student" else 1.0)


@pytest.mark.parametrize("name", VIEWS)
def test_its_batches_are_those_of_the_torchvision_loader_up_to_rounding(images, name):
    ours, theirs = (batches(images, VIEWS[name], loader) for loader in ("gpu", "torchvision"))
    for batch, expected in zip(ours, theirs, strict=True):
        assert batch.keys() == expected.keys()
        for key, values in expected.items():
            assert batch[key].dtype == values.dtype and batch[key].shape == values.shape
            if values.dim() < 4:
                assert torch.equal(batch[key], values), key
                continue
            assert batch[key].is_contiguous()
            difference = levels(batch[key], values, key)
            # A level in some of the pixels where Pillow resizes heights before widths, which is rounded in between.
            assert difference.mean() < 0.3 and (difference > 1.5).float().mean() < 0.02, key


def test_small_images_of_one_size_have_the_same_levels_but_where_a_rounding_is_close(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):  # noise, in which every overshoot is cut off: the hardest that there is
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    ours, theirs = (
        batches(find_images(tmp_path), TokenizerView(48, (0.5, 1.0)), name) for name in ("gpu", "torchvision")
    )
    difference = torch.cat([levels(a["image"], b["image"], "") for a, b in zip(ours, theirs, strict=True)])
    assert difference.max() < 1.01 and (difference > 0.5).float().mean() < 1e-3


def test_a_step_has_the_same_bits_after_a_resume_and_ranks_share_it(images):
    whole = batches(images, VIEWS["pretrain"], "gpu")
    resumed = batches(images, VIEWS["pretrain"], "gpu", start_step=3)
    ranks = [batches(images, VIEWS["pretrain"], "gpu", batch_size=2, rank=r, world_size=2) for r in range(2)]
    for name in whole[0]:
        assert torch.equal(torch.stack([b[name] for b in resumed]), torch.stack([b[name] for b in whole[3:]]))
        for step, one in enumerate(whole):
            assert torch.equal(torch.cat([ranks[0][step][name], ranks[1][step][name]]), one[name])


def test_an_evaluation_sees_every_image_once_and_its_last_batch_may_be_smaller(images):
    dataset = ImageFolder(images, EvalView(48), loader="gpu")
    found = list(eval_loader(dataset, 4))
    assert [len(batch["image"]) for batch in found] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(10))


def test_views_repeat_after_their_number_and_another_view_needs_no_new_decoding(images, monkeypatch):
    dataset = ImageFolder(images, TokenizerView(64), seed=5, views=2, loader="gpu")
    monkeypatch.setattr(type(dataset.images), "open", None)
    first, again = keyed_loader(dataset, [(1, 3), (3, 3)], 1)
    assert torch.equal(first["image"], again["image"]) and first["view"].item() == again["view"].item() == 1
    dataset.view = TokenizerView(32)
    (small,) = keyed_loader(dataset, [(1, 3)], 1)
    assert small["image"].shape == (1, 3, 32, 32)


def test_it_is_not_rounded_to_bf16_where_the_caller_autocasts(images):
    expected = batches(images, VIEWS["tokenizer"], "gpu")[0]["image"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batches(images, VIEWS["tokenizer"], "gpu")[0]["image"], expected)


def test_many_images_are_decoded_by_processes_to_the_same_pixels(images, monkeypatch):
    one = ImageFolder(images, EvalView(48), loader="gpu").stored.pixels
    kept = ImageFolder(images, EvalView(48), in_memory=True)
    monkeypatch.setattr(images_module, "processes_for", lambda count: 2)
    monkeypatch.setattr(images_module, "DECODED_AT_ONCE", 3)
    assert torch.equal(ImageFolder(images, EvalView(48), loader="gpu").stored.pixels, one)
    again = ImageFolder(images, EvalView(48), in_memory=True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(kept._decoded, again._decoded, strict=True))


def test_a_damaged_image_is_named_by_whichever_process_decodes_it(tmp_path, monkeypatch):
    found = find_images(write_images(tmp_path / "images"))
    (tmp_path / "images" / "03.png").write_bytes(b"no image")
    for workers in (0, 2):
        monkeypatch.setattr(images_module, "processes_for", lambda count, workers=workers: workers)
        with pytest.raises(DataError, match=r"03\.png could be read when it was checked"):
            ImageFolder(found, EvalView(32), loader="gpu")


def test_a_decoding_process_that_dies_is_an_error_with_advice():
    with pytest.raises(DataError, match="A process that read images died"):
        list(forks.by_processes(lambda task: os._exit(1) if task else task, range(4), 2))


def test_a_step_launches_few_kernels(images, monkeypatch):
    """About 5 us each on the host: half a millisecond of it, whatever the batch."""
    monkeypatch.setattr(views, "color_jitter", views.jitter_batched)  # as on a GPU
    loader = StoredLoader(ImageFolder(images, VIEWS["pretrain"], seed=5, loader="gpu"), [])
    drawn = loader._drawn([(0, i) for i in range(10)])
    looks = (
        "view",
        "slice",
        "select",
        "expand",
        "permute",
        "transpose",
        "unsqueeze",
        "unbind",
        "lift_fresh",
        "detach",
        "alias",
    )

    counts: collections.Counter[str] = collections.Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Counting():
        loader._made(*drawn)
    launched = sum(count for name, count in counts.items() if name.removeprefix("_unsafe_") not in looks)
    assert 50 < launched <= 110, counts


def cuda_with(monkeypatch, free: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(free)))


def test_auto_chooses_it_on_a_gpu_where_the_images_fit_and_says_how_much_they_take(images, monkeypatch):
    cuda_with(monkeypatch, 64e9)
    view = VIEWS["tokenizer"]
    name, why = choose_loader("auto", images=images, view=view, device=CUDA)
    assert (name, why) == ("gpu", "the decoded images take 0.01 GB of its memory")  # 10 of 500x500 pixels, 3 bytes each
    assert choose_loader("auto", in_memory=True, images=images, view=view, device=CUDA)[0] == "gpu"
    assert choose_loader("auto", images=images, view=view, device=torch.device("cpu"))[0] != "gpu"
    assert choose_loader("auto", images=find_images(images.root), view=view, device=CUDA)[0] != "gpu"  # sizes unknown


@pytest.mark.parametrize("reason", ["room for 0.00", "side of 500 pixels", "RandAugment", "long to be decoded"])
def test_auto_passes_it_over_and_asking_for_it_is_refused_with_the_reason(images, monkeypatch, reason):
    cuda_with(monkeypatch, 4e6 if reason == "room for 0.00" else 64e9)
    view = FinetuneView(48, ops=2) if reason == "RandAugment" else VIEWS["tokenizer"]
    if reason == "side of 500 pixels":
        monkeypatch.setattr(stored, "MAX_SIDE", 499)
    if reason == "long to be decoded":
        monkeypatch.setattr("beitv2_fast.data.loaders.AUTO_BYTES", 1e6)
    name, why = choose_loader("auto", in_memory=True, images=images, view=view, device=CUDA)
    assert name == "torchvision" and reason in why
    if reason != "long to be decoded":
        with pytest.raises(UserError, match=f"--loader gpu: .*{reason}"):
            choose_loader("gpu", images=images, view=view, device=CUDA)


def test_what_has_not_been_checked_is_refused_once_it_is_decoded(images, monkeypatch):
    monkeypatch.setattr(stored, "MAX_SIDE", 499)
    with pytest.raises(UserError, match="side of 500 pixels, and at most 499"):
        ImageFolder(find_images(images.root), EvalView(48), loader="gpu")
