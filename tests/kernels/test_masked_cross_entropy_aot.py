"""The Triton kernels of masked_cross_entropy, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.aot import LEAST_SHARED, TARGETS, Binary

from ..support.launches import binaries

pytest.importorskip("triton")
from beitv2_fast.kernels.masked_cross_entropy import triton as host

TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}
BF16 = torch.bfloat16
ROWS = 256


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def per_row() -> tuple[Tensor, Tensor, Tensor]:
    """labels, losses, correct"""
    return torch.zeros(ROWS, dtype=torch.int64), empty(ROWS), empty(ROWS, dtype=torch.bool)


def softmax(target: str, classes: int) -> Binary:
    logits, sums = empty(ROWS, classes, dtype=BF16), empty(1, 32, classes)
    call = lambda: host.softmax_triton_(logits, empty(classes), *per_row(), True, sums)  # noqa: E731
    (binary,) = binaries(target, call).values()
    return binary


def norm(target: str, dim: int, dtype: torch.dtype = BF16) -> list[Binary]:
    tokens, rows, positions = empty(4, 1 + 196, dim, dtype=dtype)[:, 1:], empty(ROWS, dim, dtype=dtype), per_row()[0]
    normalized, weight = host.Normalized(rows, empty(ROWS), empty(ROWS)), empty(dim)
    given, gradients = ([tokens], positions), ([empty(ROWS, dim)], empty(1, 2, dim))
    found = binaries(
        target,
        lambda: host.normalize_triton(*given, weight, weight, 1e-6, dtype),
        lambda: host.normalize_backward_triton(rows, *given, normalized, weight, *gradients),
    )
    assert len(found) == 2
    return list(found.values())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_fits_and_runs_on_tensor_cores(target, dtype):
    hidden, weight = empty(ROWS, 768, dtype=dtype), empty(8192, 768, dtype=dtype)
    found = binaries(target, lambda: host.loss_triton(hidden, weight, empty(8192), *per_row()))
    assert found.keys() == {"linear_loss", "combine_parts"} and found["combine_parts"].fits
    binary = found["linear_loss"]
    assert binary.fits and (target != "sm_80" or binary.shared <= LEAST_SHARED), binary.summary()
    assert binary.tensor_instructions and all(op.startswith(TENSOR_CORE[target]) for op in binary.tensor_instructions)
    assert binary.wide_loads >= 2 and binary.blocks_per_sm >= 1, binary.summary()


@pytest.mark.parametrize("target", TARGETS)
def test_the_memory_bound_kernels_fit_and_read_16_bytes_per_lane(target):
    """With enough loads in flight to hide the memory; on sm_100 a row in registers spills at the registers that two
    need."""
    in_registers, block_by_block = softmax(target, 8192), softmax(target, 20_000)
    for binary in (in_registers, block_by_block, *norm(target, 768)):
        assert binary.fits, binary.summary()
        assert binary.wide_loads >= 1, binary.summary()
        least = 0.25 if binary is in_registers and target == "sm_100" else 0.4
        assert binary.occupancy >= least, binary.summary()


@pytest.mark.parametrize("dim", [1, 1024, 4096, 8192])
def test_the_norm_fits_at_any_width(dim):
    assert all(binary.fits for binary in norm("sm_80", dim, torch.float32))
