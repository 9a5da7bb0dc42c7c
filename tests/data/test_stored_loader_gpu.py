"""What a GPU cuts (`--loader gpu`) or finishes (of the workers' pictures): the CPU's batches, made without a wait."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import choose_loader, train_loader

from ..support.gpu import HERE, cuda_only, no_waiting
from .test_stored_loader import VIEWS, images, levels  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("loader", ("gpu", "torchvision"))
@pytest.mark.parametrize("name", VIEWS)
def test_its_batches_are_the_cpu_s_and_nobody_waits_for_them(images, name, loader):  # noqa: F811
    here, there = (ImageFolder(images, VIEWS[name], seed=5, loader=loader, device=where) for where in (HERE, "cpu"))
    steps = {"batch_size": 4, "total_steps": 5, "seed": 5}
    with no_waiting():
        ours = list(train_loader(here, **steps))
    for batch, expected in zip(ours, train_loader(there, **steps), strict=True):
        assert batch.keys() == expected.keys()
        for key, values in expected.items():
            names = ("index", "view") if loader == "gpu" else ("index", "view", "label")
            assert batch[key].device.type == ("cpu" if key in names else HERE)
            if values.dim() < 4:
                assert torch.equal(batch[key].cpu(), values)
            else:
                difference = levels(batch[key].cpu(), values, key)
                # One level, and what color jitter makes of it in three steps that each truncate.
                assert difference.mean() < 0.6 and (difference > 3).float().mean() < 1e-3


@cuda_only
def test_auto_chooses_it(images):  # noqa: F811
    assert choose_loader("auto", images=images, view=VIEWS["tokenizer"], device=torch.device(HERE))[0] == "gpu"
