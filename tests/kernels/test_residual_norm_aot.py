"""The kernels of residual_norm, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS
from bench.gpu_kernels import residual_norm_cases

pytest.importorskip("triton")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
def test_no_register_spills_and_loads_are_of_16_bytes(width, target):
    for case in residual_norm_cases(c=width):
        binary = case.compile(target)
        assert binary.fits, binary.summary()
        assert target == "gfx942" or binary.wide_loads >= 2, binary.summary()
        assert binary.occupancy >= 0.25, binary.summary()


@pytest.mark.parametrize("width", [192, 384, 768, 1024])
def test_every_program_of_the_backward_runs_at_once(width):
    """Four per multiprocessor: with fewer the last ones would begin when the others end."""
    backward = next(case for case in residual_norm_cases(c=width) if "backward" in case.name)
    assert backward.compile("sm_90").blocks_per_sm >= 4
