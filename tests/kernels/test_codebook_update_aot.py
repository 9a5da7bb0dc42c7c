"""The kernels of codebook_update, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from bench.aot import TARGETS, Binary

from ..support.launches import binaries

pytest.importorskip("triton")
from beitv2_fast.kernels.codebook_update.triton import apply_statistics_triton, codebook_statistics_triton

DIMS = [32, 256]
COUNT, CODES = 1024, 512


def statistics(target: str, dim: int, dtype: torch.dtype = torch.float32, metric: str = "cosine") -> Binary:
    x, indices = torch.empty(COUNT, dim, dtype=dtype), torch.zeros(COUNT, dtype=torch.int64)
    (binary,) = binaries(target, lambda: codebook_statistics_triton(x, indices, CODES, metric)).values()
    return binary


def check(binary: Binary, wide_loads: int = 0) -> None:
    assert binary.fits, binary.summary()
    assert binary.wide_loads >= wide_loads, binary.summary()
    assert binary.occupancy >= 0.25, binary.summary()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
def test_statistics_fit_and_load_16_bytes(target, dim):
    check(statistics(target, dim), wide_loads=1)
    # 1024 elements are 4 for each of 256 lanes of gfx942: 8 bytes in bf16.
    check(statistics(target, dim, torch.bfloat16), wide_loads=0 if target == "gfx942" else 1)
    check(statistics(target, dim, metric="euclidean"), wide_loads=1)


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_add_integers_without_waiting_for_the_sum(target):
    opcodes = [i.opcode for i in statistics(target, 32).instructions]
    if target == "gfx942":
        assert any(op.startswith(("global_atomic_add_x2", "buffer_atomic_add_x2")) for op in opcodes)
    else:
        assert any(op.startswith("RED") and "64" in op for op in opcodes), [
            o for o in opcodes if "RED" in o or "ATOM" in o
        ]
        assert not any(op.startswith("ATOMG") for op in opcodes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("metric", "average"), [("cosine", False), ("cosine", True), ("euclidean", True)])
def test_the_second_pass_fits(target, dim, metric, average):
    width = 1 + dim * (1 if metric == "cosine" else 2)
    given = (torch.empty(CODES, width, dtype=torch.int64), torch.empty(CODES, dim), torch.empty(CODES))
    given += (torch.empty(CODES, dim) if average else None, 0.99, metric, 1e-5)
    check(binaries(target, lambda: apply_statistics_triton(*given))["codes_kernel"], wide_loads=1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_division_and_root_are_correctly_rounded(target):
    """MUFU.RCP64H and MUFU.RSQ64H are followed by Newton steps in fp64, none of which exists in fp32."""
    opcodes = [i.opcode for i in statistics(target, 32).instructions]
    assert any(op.startswith("MUFU.RSQ64H") for op in opcodes) and any(op.startswith("MUFU.RCP64H") for op in opcodes)
    assert not any(op.startswith(("MUFU.RCP", "MUFU.RSQ", "MUFU.SQRT")) and "64H" not in op for op in opcodes)
