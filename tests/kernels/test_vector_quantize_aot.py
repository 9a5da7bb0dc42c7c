"""The kernel of vector_quantize's gradient, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from bench.aot import TARGETS

from ..support.launches import binaries
from .test_codebook_update_aot import COUNT, DIMS, check

pytest.importorskip("triton")
from beitv2_fast.kernels.vector_quantize.triton import vector_quantize_backward_triton


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
def test_the_gradient_fits_and_loads_16_bytes(target, dim):
    quantized, loss = torch.empty(COUNT, dim), torch.ones(())
    for dtype, wide_loads in ((torch.float32, 3), (torch.bfloat16, 2)):
        given = torch.empty(COUNT, dim, dtype=dtype), quantized, quantized, loss, 0.25, "cosine"
        (binary,) = binaries(target, lambda given=given: vector_quantize_backward_triton(*given)).values()
        check(binary, wide_loads)
