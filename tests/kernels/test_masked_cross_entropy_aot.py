"""The Triton kernels of masked_cross_entropy, compiled for GPUs that are not here, in every configuration used."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, Binary, compile_kernel

pytest.importorskip("triton")
from beitv2_fast.kernels.masked_cross_entropy.triton import (
    LOSS_CONFIGS,
    NORM_ROWS,
    SOFTMAX_BLOCK,
    SOFTMAX_WARPS,
    norm_launch,
)
from beitv2_fast.kernels.masked_cross_entropy.triton_loss import combine_parts, linear_loss, softmax_gradient
from beitv2_fast.kernels.masked_cross_entropy.triton_norm import normalize_rows, normalize_rows_backward

TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}
PARTS = {"tops": "*fp32", "indices": "*i32", "sums": "*fp32", "targets": "*fp32"}
ROWS = {"images": "i32", "patches": "i32", "C": "i32", "stride_b": "i64", "stride_n": "i32"}


def compile_loss(target: str, dtype: str = "bf16") -> Binary:
    config = LOSS_CONFIGS[target]
    signature = {"hidden": f"*{dtype}", "weight": f"*{dtype}", "bias": "*fp32", "labels": "*i64", **PARTS}
    signature |= {"M": "i32", "V": "i32", "C": "i32", "parts": "i32", "blocks_of_part": "i32"}
    constants = {"HAS_BIAS": True, "EVEN_C": True}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_V": config.block_v, "BLOCK_C": config.block_c}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_kernel(linear_loss, signature, constants, target, aligned=("M", "V", "C"), **options)


def compile_combine(target: str) -> Binary:
    signature = {**PARTS, "labels": "*i64", "losses": "*fp32", "correct": "*i1", "M": "i32", "V": "i32", "parts": "i32"}
    return compile_kernel(combine_parts, signature, {"BLOCK_M": 128}, target)


def compile_softmax(target: str, dtype: str = "bf16") -> Binary:
    signature = {"logits": f"*{dtype}", "bias": "*fp32", "labels": "*i64", "losses": "*fp32", "correct": "*i1"}
    constants = {"HAS_BIAS": True, "GRADIENT": True, "BLOCK_V": SOFTMAX_BLOCK}
    return compile_kernel(
        softmax_gradient, {**signature, "V": "i32"}, constants, target, aligned=("V",), num_warps=SOFTMAX_WARPS
    )


def compile_norm(target: str, dtype: str = "bf16", dim: int = 768) -> Binary:
    signature = {"tokens": f"*{dtype}", "positions": "*i64", "weight": "*fp32", "bias": "*fp32", "hidden": f"*{dtype}"}
    signature |= {"means": "*fp32", "rstds": "*fp32", "eps": "fp32", **ROWS}
    launch = norm_launch(dim)
    constants = {"stride_c": 1, "BLOCK_C": launch["BLOCK_C"]}
    aligned = ("C", "stride_b", "stride_n")
    return compile_kernel(normalize_rows, signature, constants, target, aligned=aligned, num_warps=launch["num_warps"])


def compile_norm_backward(target: str, dtype: str = "bf16", dim: int = 768) -> Binary:
    signature = {"grad_hidden": f"*{dtype}", "tokens": f"*{dtype}", "positions": "*i64", "weight": "*fp32"}
    signature |= {"means": "*fp32", "rstds": "*fp32", "grad_rows": "*fp32", "partial": "*fp32", "rows": "i32", **ROWS}
    launch = norm_launch(dim)
    constants = {"stride_c": 1, "ROWS": NORM_ROWS, "WRITE_ROWS": True, "WRITE_NORM": True}
    constants["BLOCK_C"] = launch["BLOCK_C"]
    aligned = ("C", "stride_b", "stride_n")
    return compile_kernel(
        normalize_rows_backward, signature, constants, target, aligned=aligned, num_warps=launch["num_warps"]
    )


MEMORY_BOUND = [compile_softmax, compile_norm, compile_norm_backward]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_fits_and_runs_on_tensor_cores(target, dtype):
    binary = compile_loss(target, dtype)
    assert binary.fits, binary.summary()
    assert binary.tensor_instructions and all(op.startswith(TENSOR_CORE[target]) for op in binary.tensor_instructions)
    assert binary.wide_loads >= 2 and binary.blocks_per_sm >= 1, binary.summary()


@pytest.mark.parametrize("compile_one", MEMORY_BOUND, ids=lambda f: f.__name__.removeprefix("compile_"))
@pytest.mark.parametrize("target", TARGETS)
def test_the_memory_bound_kernels_fit_and_read_16_bytes_per_lane(target, compile_one):
    binary = compile_one(target)
    assert binary.fits, binary.summary()
    assert binary.wide_loads >= 1, binary.summary()
    assert binary.occupancy >= 0.4, binary.summary()  # enough loads in flight to hide the memory


@pytest.mark.parametrize("target", TARGETS)
def test_the_combination_of_parts_fits(target):
    assert compile_combine(target).fits


@pytest.mark.parametrize("dim", [1, 1024, 4096, 8192])
def test_the_norm_fits_at_any_width(dim):
    for compile_one in (compile_norm, compile_norm_backward):
        assert compile_one("sm_80", "fp32", dim).fits
