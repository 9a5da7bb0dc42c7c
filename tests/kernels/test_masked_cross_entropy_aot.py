"""The Triton kernels of masked_cross_entropy, compiled for GPUs that are not here, in every configuration used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.aot import TARGETS, Binary, compile_kernel
from bench.gpu_kernels import head_cases

pytest.importorskip("triton")
from beitv2_fast.kernels.masked_cross_entropy.triton_loss import combine_parts

TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}
NORM = ("normalize_rows", "normalize_rows_backward")


def compiled(name: str, target: str, dtype: str = "bf16", dim: int = 768) -> Binary:
    """The kernel of bench.gpu_kernels, with another dtype in place of bf16."""
    case = next(case for case in head_cases(target, c=dim) if case.name == name)
    types = {argument: kind.replace("bf16", dtype) for argument, kind in case.signature.items()}
    return replace(case, signature=types).compile(target)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_fits_and_runs_on_tensor_cores(target, dtype):
    binary = compiled("linear_loss (no gradient)", target, dtype)
    assert binary.fits, binary.summary()
    assert binary.tensor_instructions and all(op.startswith(TENSOR_CORE[target]) for op in binary.tensor_instructions)
    assert binary.wide_loads >= 2 and binary.blocks_per_sm >= 1, binary.summary()


@pytest.mark.parametrize("name", ["softmax_rows", "softmax_gradient", *NORM])
@pytest.mark.parametrize("target", TARGETS)
def test_the_memory_bound_kernels_fit_and_read_16_bytes_per_lane(target, name):
    binary = compiled(name, target)
    assert binary.fits, binary.summary()
    assert binary.wide_loads >= 1, binary.summary()
    # Enough loads in flight to hide the memory; on sm_100 a row of softmax_rows spills at the registers that two need.
    least = 0.25 if (name, target) == ("softmax_rows", "sm_100") else 0.4
    assert binary.occupancy >= least, binary.summary()


@pytest.mark.parametrize("target", TARGETS)
def test_the_combination_of_parts_fits(target):
    signature = {"tops": "*fp32", "indices": "*i32", "sums": "*fp32", "targets": "*fp32", "labels": "*i64"}
    signature |= {"losses": "*fp32", "correct": "*i1", "M": "i32", "V": "i32", "parts": "i32"}
    assert compile_kernel(combine_parts, signature, {"BLOCK_M": 128}, target).fits


@pytest.mark.parametrize("dim", [1, 1024, 4096, 8192])
def test_the_norm_fits_at_any_width(dim):
    for name in NORM:
        assert compiled(name, "sm_80", "fp32", dim).fits
