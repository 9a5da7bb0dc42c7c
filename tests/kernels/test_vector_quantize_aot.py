"""The kernel of vector_quantize, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, Binary, compile_kernel

from .test_codebook_update_aot import DIMS, check

pytest.importorskip("triton")
from beitv2_fast.kernels.codebook_update.triton import tile_shape
from beitv2_fast.kernels.vector_quantize.triton_backward import backward_kernel


def compile_backward(target: str, dim: int, dtype: str = "fp32") -> Binary:
    block_n, block_d = tile_shape(dim)
    signature = {"x": f"*{dtype}", "quantized": "*fp32", "grad": "*fp32", "grad_loss": "*fp32", "out": f"*{dtype}"}
    signature |= {"N": "i32", "weight": "fp32", "stride_xn": "i32", "stride_gn": "i32"}
    flags = {"COSINE": True, "HAS_GRAD": True, "HAS_LOSS": True, "stride_xd": 1, "stride_gd": 1}
    blocks = {"D": dim, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return compile_kernel(backward_kernel, signature, {**flags, **blocks}, target, aligned=["stride_xn", "stride_gn"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
def test_the_gradient_fits_and_loads_16_bytes(target, dim):
    check(compile_backward(target, dim), wide_loads=3)
    check(compile_backward(target, dim, "bf16"), wide_loads=2)
