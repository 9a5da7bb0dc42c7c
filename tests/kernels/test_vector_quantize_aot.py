"""The kernel of vector_quantize's gradient, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS

from .test_codebook_update_aot import DIMS, check, compiled


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
def test_the_gradient_fits_and_loads_16_bytes(target, dim):
    check(compiled("backward", target, dim), wide_loads=3)
    check(compiled("backward", target, dim, {"x": "*bf16", "out": "*bf16"}), wide_loads=2)
