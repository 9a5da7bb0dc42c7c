"""block_masks and random_masks on a GPU: the masks of the CPU."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.data.draws import patch_masks
from beitv2_fast.kernels.block_masks import block_masks

from ..support.gpu import HERE, here, no_waiting
from .test_block_masks import KEYS

pytestmark = pytest.mark.gpu
SETTINGS = [((14, 14), 75, 16), ((16, 16), 98, 16), ((7, 5), 35, 1), ((7, 5), 0, 1), ((1, 1), 1, 1), ((6, 40), 90, 4)]


@pytest.mark.parametrize(("grid", "num_masked", "min_patches"), SETTINGS)
def test_a_gpu_draws_the_cpu_s_blocks(grid, num_masked, min_patches):
    expected = block_masks(KEYS, grid, num_masked, min_patches=min_patches)
    masks = block_masks(here(KEYS), grid, num_masked, min_patches=min_patches)
    assert masks.device.type == HERE and torch.equal(masks.cpu(), expected)
    assert (masks.sum((1, 2)) == num_masked).all()


def test_flat_blocks_and_small_ones_are_the_cpu_s():
    options = dict(min_patches=4, min_aspect=0.05, max_patches=9)
    assert torch.equal(
        block_masks(here(KEYS), (14, 14), 75, **options).cpu(), block_masks(KEYS, (14, 14), 75, **options)
    )


@pytest.mark.parametrize("num_masked", [0, 1, 75, 196])
def test_a_gpu_draws_the_cpu_s_single_patches(num_masked):
    masks = [patch_masks(keys, "random", (14, 14), num_masked, 1) for keys in (here(KEYS), KEYS)]
    assert torch.equal(masks[0].cpu(), masks[1]) and (masks[1].sum(1) == num_masked).all()


@pytest.mark.parametrize("kind", ["block", "random"])
def test_no_keys_and_one_key(kind):
    for keys in (KEYS[:0], KEYS[:1]):
        expected = patch_masks(keys, kind, (14, 14), 75, 16)
        assert torch.equal(patch_masks(here(keys), kind, (14, 14), 75, 16).cpu(), expected)


@pytest.mark.parametrize("kind", ["block", "random"])
def test_the_host_waits_for_nothing(kind):
    keys = here(KEYS)
    with no_waiting():
        masks = patch_masks(keys, kind, (14, 14), 75, 16)
    assert torch.equal(masks.cpu(), patch_masks(KEYS, kind, (14, 14), 75, 16))
