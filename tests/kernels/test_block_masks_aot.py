"""The kernel of block_masks, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, compile_kernel

pytest.importorskip("triton")
from beitv2_fast.kernels.block_masks.triton_paint import paint_masks


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("side", "num_warps"), [(16, 1), (64, 16)])
def test_it_fits(side, num_warps, target):
    signature = {"keys": "*i64", "masks": "*u8"} | dict.fromkeys(("num_masked", "min_patches", "max_patches"), "i32")
    constants = {"HEIGHT": side - 2, "WIDTH": side - 2, "LOG_ASPECT": -1.2, "BLOCK_H": side, "BLOCK_W": side}
    binary = compile_kernel(paint_masks, signature, constants, target, num_warps=num_warps)
    assert binary.fits, binary.summary()
