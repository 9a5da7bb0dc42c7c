"""Block masks have the exact count and the reference's statistics."""

from __future__ import annotations

import math
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.data.draws import image_keys, random_masks
from beitv2_fast.data.views import Cut, PretrainView
from beitv2_fast.kernels.block_masks import block_masks
from beitv2_fast.train import pretrain
from beitv2_fast.train.pretrain import PretrainTask
from beitv2_fast.weights.build import build_student

from ..support.small_runs import small_runs
from ..support.training import PRETRAIN, TINY, call

SAMPLES = 8000
# The largest deviation, in standard errors of the difference of two samples, that chance may cause: each test looks at
# up to 196 numbers, of which one exceeds 4.5 in 1 of 700 samples. The seed is fixed: what passes keeps passing.
Z_MAX = 4.5
REFERENCE_COMPONENT_SAMPLES = 5000


def image_keys_of(seed, count):
    return torch.from_numpy(image_keys(seed, np.zeros(count, np.int64), np.arange(count)).view(np.int64))


@pytest.fixture(scope="module", params=["14x14_75", "8x8_26"])
def sampled(request, golden):
    """(the reference's statistics, our masks [N, H, W]) of one setting"""
    want = golden[request.param]
    masks = block_masks(
        image_keys_of(1, SAMPLES),
        (want["grid"], want["grid"]),
        want["num_masking_patches"],
        min_patches=want["min_num_patches"],
        min_aspect=want["min_aspect"],
        max_patches=want["max_num_patches"],
    )
    return want, masks


@pytest.fixture(scope="module")
def components(sampled):
    """The sizes of the 4-connected components of each mask."""
    return [component_sizes(mask) for mask in sampled[1][:REFERENCE_COMPONENT_SAMPLES].tolist()]


def component_sizes(mask: list[list[bool]]) -> list[int]:
    todo = {(y, x) for y, row in enumerate(mask) for x, masked in enumerate(row) if masked}
    sizes = []
    while todo:
        stack, size = [todo.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            for neighbor in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbor in todo:
                    todo.remove(neighbor)
                    stack.append(neighbor)
        sizes.append(size)
    return sizes


def test_each_patch_is_masked_as_often_as_in_the_reference(sampled):
    want, masks = sampled
    expected = torch.tensor(want["marginal_mean"], dtype=torch.float64)
    error = (expected * (1 - expected) * (1 / SAMPLES + 1 / want["samples"])).sqrt()
    z = (masks.double().mean(0) - expected) / error
    assert z.abs().max() < Z_MAX


def test_masks_fall_into_as_many_components_as_the_reference(sampled, components):
    want, _ = sampled
    reference, ours = Counter(), Counter()
    for number, count in want["components_hist"].items():
        reference[min(int(number), 4)] += count
    for sizes in components:
        ours[min(len(sizes), 4)] += 1
    n, m = sum(ours.values()), sum(reference.values())
    for number in reference:
        pooled = (ours[number] + reference[number]) / (n + m)
        error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        assert abs(ours[number] / n - reference[number] / m) < Z_MAX * error, f"{number} components"


def test_the_largest_component_is_as_large_as_in_the_reference(sampled, components):
    want, _ = sampled
    largest = torch.tensor([max(sizes) for sizes in components], dtype=torch.float64)
    error = want["largest_component_std"] * math.sqrt(1 / len(largest) + 1 / REFERENCE_COMPONENT_SAMPLES)
    assert abs(largest.mean().item() - want["largest_component_mean"]) < Z_MAX * error
    # The standard error of a standard deviation; 2 because the distribution is far from normal.
    assert abs(largest.std().item() - want["largest_component_std"]) < Z_MAX * 2 * error


def test_right_neighbors_of_masked_patches_are_masked_as_often_as_in_the_reference(sampled):
    want, masks = sampled
    left, right = masks[:, :, :-1], masks[:, :, 1:]
    both, first = (left & right).sum((1, 2)).double(), left.sum((1, 2)).double()
    ratio = both.sum() / first.sum()
    spread = (both - ratio * first).std() / first.mean()  # of one mask's contribution to the ratio (delta method)
    error = spread * math.sqrt(1 / SAMPLES + 1 / REFERENCE_COMPONENT_SAMPLES)
    assert abs(ratio - want["right_neighbour_masked"]) < Z_MAX * error  # codespell:ignore neighbour


def test_a_block_is_smaller_than_the_grid_in_both_directions():
    # In a 2x2 grid only single patches are, so the two diagonals are 2 of 6 equally likely pairs.
    masks = block_masks(image_keys_of(0, 2000), (2, 2), 2, min_patches=2)
    diagonals = (masks[:, 0, 0] == masks[:, 1, 1]).double().mean()
    assert abs(diagonals - 1 / 3) < Z_MAX * math.sqrt(1 / 3 * 2 / 3 / 2000)


def test_random_masks_hide_every_patch_equally_often_and_the_exact_number():
    masks = random_masks(image_keys_of(3, 4000), (6, 5), 12)
    assert (masks.sum((1, 2)) == 12).all() and masks.dtype == torch.bool
    share = masks.double().mean(0)
    error = math.sqrt(0.4 * 0.6 / 4000)
    assert (share - 0.4).abs().max() < Z_MAX * error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (0, 4), "num_masked": 0}, "0x4"),
        ({"grid": (4, 4), "num_masked": 17}, "17.*0 .. 16"),
        ({"grid": (4, 4), "num_masked": -1}, "-1.*0 .. 16"),
        ({"grid": (4, 4), "num_masked": 3, "min_patches": 0}, "min_patches is 0"),
        ({"grid": (4, 4), "num_masked": 3, "min_aspect": 0.0}, "min_aspect is 0"),
        ({"grid": (4, 4), "num_masked": 3, "min_patches": 4, "max_patches": 2}, "max_patches is 2"),
    ],
)
def test_impossible_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_masks(image_keys_of(0, 1), arguments.pop("grid"), arguments.pop("num_masked"), **arguments)


@pytest.mark.parametrize("num_masked", [-1, 17])
def test_impossible_numbers_of_random_patches_are_refused(num_masked):
    with pytest.raises(ValueError, match=f"num_masked is {num_masked}"):
        random_masks(image_keys_of(0, 1), (4, 4), num_masked)


def test_the_most_patches_of_a_block_reach_the_masks_of_a_pre_training_whoever_draws_them():
    settings = {"num_masked": 12, "min_mask_patches": 2, "max_mask_patches": 3}
    view = PretrainView(30, 30, (6, 5), **settings)
    key = torch.arange(20)
    expected = block_masks(key, (6, 5), 12, min_patches=2, max_patches=3).flatten(1)
    assert torch.equal(torch.from_numpy(view._masks(key.numpy())), expected)
    assert not torch.equal(expected, block_masks(key, (6, 5), 12, min_patches=2).flatten(1))
    config = PretrainConfig(image_size=30, patch_size=5, dim=8, depth=1, heads=1, early_layer=1, **settings)
    task = PretrainTask(build_student(config, 4), Mock(), config)
    square = block_masks(key, (6, 6), 12, min_patches=2, max_patches=3).flatten(1)
    assert torch.equal(task._mask({"mask_key": key}), square)


def test_the_tokenizer_s_view_is_resized_as_asked(tmp_path, monkeypatch):
    """--tokenizer-interpolation reaches the view."""
    root, seen = small_runs(tmp_path), []
    monkeypatch.setattr(pretrain, "train", lambda task, config, dataset, *rest, **_: seen.append(dataset.view) or 0)
    options = [*TINY, *PRETRAIN, "--data", root / "data", "--tokenizer", root / "tokenizer"]
    assert call("pretrain", *options, "--tokenizer-interpolation", "lanczos", "--out", tmp_path / "out") == 0
    assert seen[0].pictures["tokenizer"] == Cut(32, "lanczos") and seen[0].pictures["student"] == Cut(32, "bicubic")
