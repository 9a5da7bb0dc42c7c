"""`--masks device`: masks drawn where the training computes are those that the loader would have drawn."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.data.draws import patch_masks
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import PretrainView
from beitv2_fast.train.pretrain import PretrainTask

from ..support.small_runs import small_tokenizer
from ..support.training import PRETRAIN, TINY, assert_same_bits, call, write_images

GRID, COUNT, LEAST = (6, 5), 12, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


def batches(images, kind: str = "block", masks: str = "device", seed: int = 0, **options) -> list[dict]:
    view = PretrainView(30, 30, GRID, COUNT, LEAST, mask_kind=kind, masks=masks)
    dataset = ImageFolder(find_images(images), view, seed)
    return list(train_loader(dataset, **{"batch_size": 4, "total_steps": 6, "seed": seed, **options}))


def drawn(found: list[dict], kind: str = "block") -> torch.Tensor:
    return torch.cat([patch_masks(batch["mask_key"], kind, GRID, COUNT, LEAST) for batch in found])


@pytest.mark.parametrize("kind", ["block", "random"])
def test_they_are_the_loader_s_masks_and_of_the_exact_count(images, kind):
    loader = torch.cat([batch["mask"] for batch in batches(images, kind, "loader")])
    device = drawn(batches(images, kind), kind)
    assert torch.equal(device, loader) and (device.sum(1) == COUNT).all()
    assert len(device.unique(dim=0)) > len(device) / 2


def test_they_follow_from_the_seed_and_not_from_the_number_of_ranks(images):
    ranks = [batches(images, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    joined = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert torch.equal(drawn(joined), drawn(batches(images)))
    assert torch.equal(drawn(batches(images, start_step=4)), drawn(batches(images))[16:])
    assert not torch.equal(drawn(batches(images, seed=1)), drawn(batches(images)))


@pytest.mark.parametrize("kind", ["block", "random"])
def test_a_pre_training_with_them_ends_with_the_same_bits(images, tmp_path, monkeypatch, kind):
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    options = [*TINY, *PRETRAIN, "--mask", kind, "--data", images, "--tokenizer", tokenizer]
    assert call("pretrain", *options, "--out", tmp_path / "loader") == 0
    where, loss = [], PretrainTask.loss
    monkeypatch.setattr(
        PretrainTask, "loss", lambda self, m, batch: where.append("mask" in batch) or loss(self, m, batch)
    )
    assert call("pretrain", *options, "--masks", "device", "--out", tmp_path / "device") == 0
    assert_same_bits(tmp_path / "device", tmp_path / "loader")
    assert where and not any(where)


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ValueError, match="masks is 'moon'"):
        PretrainView(30, 30, GRID, COUNT, LEAST, masks="moon")
