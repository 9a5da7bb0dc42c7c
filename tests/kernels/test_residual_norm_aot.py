"""The kernels of residual_norm, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from bench.aot import TARGETS, Binary

from ..support.launches import binaries

pytest.importorskip("triton")
from beitv2_fast.kernels.residual_norm import triton as host


def compiled(width: int, target: str) -> dict[str, Binary]:
    """As a student's block has it: stream in fp32, branch and norm in bf16, layer scale, drop path."""
    x, row, keep, statistics = (torch.empty(shape) for shape in ((64, 197, width), width, 64, 64 * 197))
    branch = torch.empty(x.shape, dtype=torch.bfloat16)
    scaled, dtypes = (branch, row, keep, 0.9, row), (x.dtype, branch.dtype)
    return binaries(
        target,
        lambda: host.residual_norm_triton(x, *scaled, row, 1e-6, *dtypes),
        lambda: host.residual_norm_backward_triton(x, branch, x, statistics, statistics, *scaled, *dtypes),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
def test_no_register_spills_and_loads_are_of_16_bytes(width, target):
    found = compiled(width, target)
    assert len(found) == 2
    for binary in found.values():
        assert binary.fits, binary.summary()
        assert target == "gfx942" or binary.wide_loads >= 2, binary.summary()
        assert binary.occupancy >= 0.25, binary.summary()


@pytest.mark.parametrize("width", [192, 384, 768, 1024])
def test_every_program_of_the_backward_runs_at_once(width):
    """Four per multiprocessor: with fewer the last ones would begin when the others end."""
    assert compiled(width, "sm_90")["residual_norm_rows_backward"].blocks_per_sm >= 4
