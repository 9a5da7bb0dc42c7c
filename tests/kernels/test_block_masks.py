"""block_masks: the reference, the C++ op and the batched torch ops draw the same masks, with the exact count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_fast.kernels import block_masks
from beitv2_fast.kernels.block_masks.ops import block_masks_batched
from beitv2_fast.kernels.block_masks.reference import MAX_ATTEMPTS, block_masks_reference
from beitv2_fast.kernels.counter_random import random_bits

KEYS = torch.randint(-(2**63), 2**63 - 1, (400,), generator=torch.Generator().manual_seed(0))


@st.composite
def cases(draw):
    """(height, width, num_masked, min_patches, min_aspect, max_patches), rows of up to three 64-bit words"""
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 140))
    min_patches = draw(st.integers(1, 40))
    most = draw(st.integers(min_patches, min_patches + 60))
    return height, width, draw(st.integers(0, height * width)), min_patches, draw(st.floats(0.05, 1)), most


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 300))
def test_all_three_versions_draw_the_same_masks_of_the_exact_count(case, first):
    height, width, num_masked, min_patches, min_aspect, most = case
    keys = KEYS[first : first + 7]
    masks = block_masks(
        keys, (height, width), num_masked, min_patches=min_patches, min_aspect=min_aspect, max_patches=most
    )
    assert (masks.shape, masks.dtype) == (torch.Size([7, height, width]), torch.bool)
    assert (masks.sum((1, 2)) == num_masked).all()
    assert torch.equal(masks, block_masks_reference(keys, *case))
    assert torch.equal(masks, block_masks_batched(keys, *case))


def test_the_paper_s_masks_are_the_same_in_all_three_versions():
    masks, case = block_masks(KEYS, (14, 14), 75), (14, 14, 75, 16, 0.3, 75)
    assert torch.equal(masks, block_masks_reference(KEYS, *case))
    assert torch.equal(masks, block_masks_batched(KEYS, *case))


def test_the_generator_is_splitmix64_of_tensors_and_of_numpy_s_arrays():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of seed 1234567
    for k in (torch.arange(1, 5), np.arange(1, 5)):
        assert [value % 2**64 for value in random_bits(1234567, k).tolist()] == published
    keys, k = np.array([0, 1, -1, 2**62, -(2**63)])[:, None], np.arange(300)
    assert torch.equal(random_bits(torch.from_numpy(keys), torch.from_numpy(k)), torch.from_numpy(random_bits(keys, k)))


def test_a_mask_follows_from_its_own_key_only():
    masks = block_masks(KEYS, (14, 14), 75)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(masks[order], block_masks(KEYS[order], (14, 14), 75))
    assert torch.equal(masks[::3], block_masks(KEYS[::3], (14, 14), 75))
    assert len(masks.unique(dim=0)) == len(KEYS)


def test_no_paper_mask_comes_near_the_limit_of_attempts(monkeypatch):
    from beitv2_fast.kernels.block_masks import reference

    monkeypatch.setattr(reference, "MAX_ATTEMPTS", MAX_ATTEMPTS - 20)  # FIRST_FILL stays: the same single patches
    assert torch.equal(block_masks(KEYS, (14, 14), 75), block_masks_reference(KEYS, 14, 14, 75, 16, 0.3, 75))


def test_no_keys_give_no_masks():
    assert block_masks(KEYS[:0], (3, 4), 5).shape == (0, 3, 4)


@pytest.mark.parametrize("keys", [KEYS.float(), KEYS[None]])
def test_keys_of_another_type_or_shape_are_refused(keys):
    with pytest.raises(ValueError, match=r"keys must be int64 \[B\]"):
        block_masks(keys, (14, 14), 75)


class Masks(torch.nn.Module):
    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return block_masks(keys, (14, 14), 75)


def test_masks_are_exported_for_any_number_of_keys():
    dim = torch.export.Dim("n")
    program = torch.export.export(Masks(), (KEYS[:6],), dynamic_shapes=({0: dim},), strict=False).module()
    for count in (2, 6, 50):
        assert torch.equal(program(KEYS[:count]), block_masks(KEYS[:count], (14, 14), 75))
