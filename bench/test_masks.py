"""A batch of block masks: the op, its definition, torch ops, and the reference implementation's structure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from beitv2_fast.kernels import block_masks
from beitv2_fast.kernels.block_masks.ops import block_masks_batched
from beitv2_fast.kernels.block_masks.reference import block_masks_reference
from bench.harness import DEVICE, OURS, measure

BATCH, GRID, NUM_MASKED, MIN_PATCHES, MIN_ASPECT = 256, 14, 75, 16, 0.3
GROUP = f"block masks B={BATCH} {GRID}x{GRID} {NUM_MASKED} masked"
SETTINGS = (GRID, GRID, NUM_MASKED, MIN_PATCHES, MIN_ASPECT, NUM_MASKED)


def reference_structure() -> np.ndarray:
    """One mask as the reference implementation makes it: an array, and Python loops over the patches of each block."""
    mask, count = np.zeros((GRID, GRID), dtype=int), 0
    while count < NUM_MASKED:
        gain = _lay_block(mask, NUM_MASKED - count)
        if gain == 0:
            break
        count += gain
    flat = mask.flatten()
    if count < NUM_MASKED:
        visible = np.flatnonzero(flat == 0)
        flat[np.random.choice(visible, NUM_MASKED - count, replace=False)] = 1
    elif count > NUM_MASKED:
        flat[np.random.choice(np.flatnonzero(flat), count - NUM_MASKED, replace=False)] = 0
    return flat.reshape(GRID, GRID)


def _lay_block(mask: np.ndarray, wanted: int) -> int:
    for _ in range(10):
        area = random.uniform(MIN_PATCHES, wanted)
        aspect = math.exp(random.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w >= GRID or h >= GRID:
            continue
        top, left = random.randint(0, GRID - h), random.randint(0, GRID - w)
        hidden = mask[top : top + h, left : left + w].sum()
        if not 0 < h * w - hidden <= wanted:
            continue
        gain = 0
        for y in range(top, top + h):
            for x in range(left, left + w):
                if mask[y, x] == 0:
                    mask[y, x] = 1
                    gain += 1
        return gain
    return 0


KEYS = torch.randint(-(2**63), 2**63 - 1, (BATCH,), generator=torch.Generator().manual_seed(0))
ON_DEVICE = KEYS.to(DEVICE)
BATCHED = "torch ops, a block of every mask at once"
ON_DEVICE_TOO = (OURS, BATCHED)  # the others run on the CPU everywhere

IMPLEMENTATIONS: dict[str, Callable[[], object]] = {
    OURS: lambda: block_masks(ON_DEVICE, (GRID, GRID), NUM_MASKED),
    BATCHED: lambda: block_masks_batched(ON_DEVICE, *SETTINGS),
    "reference.py, Python integers": lambda: block_masks_reference(KEYS, *SETTINGS),
    "reference implementation's structure": lambda: np.stack([reference_structure() for _ in range(BATCH)]),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_block_masks(benchmark, name):
    measure(benchmark, GROUP, name, IMPLEMENTATIONS[name])
