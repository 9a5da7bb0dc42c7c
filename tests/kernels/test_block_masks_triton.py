"""The Triton kernel of block_masks, interpreted: the reference's masks, no access outside."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels.block_masks.reference import block_masks_reference

from ..support.triton_tools import guarded
from .test_block_masks import KEYS

pytest.importorskip("triton")
from beitv2_fast.kernels.block_masks.triton import block_masks_triton, fits

pytestmark = pytest.mark.interpreted

CASES = {
    "the paper's": (14, 14, 75, 16, 0.3, 75),
    "small and flat blocks": (14, 14, 75, 4, 0.05, 9),
    "squares": (16, 16, 98, 16, 1.0, 98),
    "a grid that no block fits, filled up by single patches": (3, 5, 11, 16, 0.3, 16),
    "all": (7, 5, 35, 1, 0.3, 35),
    "none": (7, 5, 0, 1, 0.3, 1),
    "one": (1, 1, 1, 1, 0.3, 1),
    "a long one": (6, 40, 90, 4, 0.3, 90),
}


@pytest.mark.parametrize("name", CASES)
def test_its_masks_are_the_reference_s(name):
    keys = KEYS[:24]
    masks = block_masks_triton(guarded(keys), *CASES[name])
    assert masks.dtype == torch.bool and (masks.sum((1, 2)) == CASES[name][2]).all()
    assert torch.equal(masks, block_masks_reference(keys, *CASES[name]))


def test_keys_may_be_strided_and_there_may_be_none():
    case = CASES["the paper's"]
    assert torch.equal(block_masks_triton(KEYS[:12:3], *case), block_masks_reference(KEYS[:12:3], *case))
    assert block_masks_triton(KEYS[:0], *case).shape == (0, 14, 14)


def test_large_grids_are_left_to_torch_ops():
    assert fits(64, 64) and fits(14, 256) and not fits(65, 64)
