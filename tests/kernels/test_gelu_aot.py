"""The kernel of gelu_and_gradient, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, compile_kernel

pytest.importorskip("triton")
from beitv2_fast.kernels.gelu.triton import BLOCK, NUM_WARPS
from beitv2_fast.kernels.gelu.triton_elements import gelu_and_gradient_elements


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_fits_and_loads_16_bytes(dtype, target):
    signature = dict.fromkeys(("x", "grad", "out", "grad_x"), f"*{dtype}") | {"count": "i32"}
    binary = compile_kernel(
        gelu_and_gradient_elements, signature, {"BLOCK": BLOCK}, target, num_warps=NUM_WARPS, aligned=("count",)
    )
    assert binary.fits, binary.summary()
    # 1024 elements are 4 for each of 256 lanes of gfx942: 8 bytes in bf16.
    assert binary.wide_loads >= (0 if target == "gfx942" and dtype == "bf16" else 2), binary.summary()
    assert binary.occupancy >= 0.5, binary.summary()
