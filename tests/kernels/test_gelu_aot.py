"""The kernel of gelu_and_gradient, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from bench.aot import TARGETS

from ..support.launches import binaries

pytest.importorskip("triton")
from beitv2_fast.kernels.gelu.triton import gelu_and_gradient_triton


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_fits_and_loads_16_bytes(dtype, target):
    x = torch.empty(64, 1536, dtype=dtype)
    (binary,) = binaries(target, lambda: gelu_and_gradient_triton(x, x)).values()
    assert binary.fits, binary.summary()
    # 1024 elements are 4 for each of 256 lanes of gfx942: 8 bytes in bf16.
    assert binary.wide_loads >= (0 if target == "gfx942" and dtype == torch.bfloat16 else 2), binary.summary()
    assert binary.occupancy >= 0.5, binary.summary()
