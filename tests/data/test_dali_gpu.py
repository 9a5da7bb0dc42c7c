"""DALI's loader on a GPU, which decodes there ("mixed"), against the same graph on the CPU."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import FinetuneView, PretrainView

from ..support.gpu import HERE
from .test_dali import VIEWS, dali, images  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu


def batches(images, view, device: str) -> dict[str, torch.Tensor]:  # noqa: F811
    dataset = ImageFolder(images, view, seed=5, loader="dali", device=device)
    keys = [[(0, i) for i in range(first, min(first + 8, len(images)))] for first in range(0, len(images), 8)]
    found = list(dali.DaliLoader(dataset, keys, 8, 2))
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "finetune"])
def test_mixed_decoding_makes_the_cpu_s_pictures_within_a_few_levels(images, name):  # noqa: F811
    """The decoders round differently: nvJPEG's transform and chroma upsampling are not libjpeg's."""
    view = VIEWS[name] if "pretrain" not in name else PretrainView(96, 96, (6, 6), 14, color_jitter=0.0)
    ours, theirs = batches(images, view, HERE), batches(images, view, "cpu")
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        found = ours[key]
        if expected.dim() < 4:
            assert torch.equal(found.cpu(), expected)
            continue
        assert found.device.type == HERE and found.shape == expected.shape and found.dtype == torch.float32
        levels = (found.cpu() - expected).abs() * 255 * (0.226 if key == "student" else 1.0)
        assert levels.mean() < 1 and (levels > 8).float().mean() < 0.01


def test_colors_are_jittered_as_on_the_cpu(images):  # noqa: F811
    view = PretrainView(96, 96, (6, 6), 14, color_jitter=0.4)
    ours, theirs = (batches(images, view, device)["student"].cpu() for device in (HERE, "cpu"))
    assert ((ours - theirs).abs() * 255 * 0.226).mean() < 2


def test_rand_augment_follows_from_the_key_and_changes_most_images(images):  # noqa: F811
    first, again = (batches(images, VIEWS["finetune"], HERE)["image"] for _ in range(2))
    plain = batches(images, FinetuneView(96, ops=0), HERE)["image"]
    assert torch.equal(first, again)
    assert ((first - plain).abs().flatten(1).max(1).values > 0.02).float().mean() > 0.7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_s_loader_leaves_its_batches_on_the_device(images, workers):  # noqa: F811
    dataset = ImageFolder(images, VIEWS["pretrain"], seed=5, loader="dali", device=HERE)
    loader = train_loader(dataset, batch_size=4, start_step=1, total_steps=4, workers=workers)
    found = list(loader)
    assert len(found) == 3
    assert all(batch[key].device.type == HERE for batch in found for key in ("student", "tokenizer", "mask"))
