"""The kernel of block_masks, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from bench.aot import TARGETS

from ..support.launches import binaries

pytest.importorskip("triton")
from beitv2_fast.kernels.block_masks.triton import block_masks_triton


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("side", [14, 62])
def test_it_fits(side, target):
    keys = torch.zeros(3, dtype=torch.int64)
    (binary,) = binaries(target, lambda: block_masks_triton(keys, side, side, 75, 16, 0.3, 75)).values()
    assert binary.fits, binary.summary()
