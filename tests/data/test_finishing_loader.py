"""Where a GPU trains, workers cut the pictures and the GPU finishes them: the same batches, an eighth of the bytes."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.torch_loader import FinishingLoader, TorchLoader

from .test_stored_loader import CUDA, VIEWS, images  # noqa: F401 (a fixture)

STEPS = {"batch_size": 4, "total_steps": 3, "seed": 5}


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("name", VIEWS)
def test_finished_batches_are_those_that_the_workers_finish(images, name, workers):  # noqa: F811
    dataset = ImageFolder(images, VIEWS[name], seed=5)
    expected = list(train_loader(dataset, **STEPS))
    batches = [list(map(tuple, zip(b["view"].tolist(), b["index"].tolist(), strict=True))) for b in expected]
    finished = FinishingLoader(dataset, batches, workers)
    assert len(finished) == 3
    for batch, other in zip(finished, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) for key in other)


def test_pictures_travel_as_bytes_and_one_crop_of_two_equal_views_once(images):  # noqa: F811
    loader = train_loader(ImageFolder(images, VIEWS["pretrain"], seed=5, device=CUDA), **STEPS)
    assert isinstance(loader, FinishingLoader) and len(loader) == 3
    pictures, draws, names = loader.cuts.dataset.__getitems__([(0, 1), (0, 2)])
    assert {name: (part.dtype, part.shape) for name, part in pictures.items()} == {
        "student": (torch.uint8, (2, 48, 48, 3))
    }
    assert sum(part.nbytes for part in draws.values()) < 2 * 200
    assert names["index"].tolist() == [1, 2]


def test_on_the_cpu_workers_finish(images):  # noqa: F811
    assert isinstance(train_loader(ImageFolder(images, VIEWS["pretrain"]), **STEPS), TorchLoader)
