"""The soak of bench.soak, for as long as a test may take; `python -m bench.soak --minutes 30` is the long one."""

from __future__ import annotations

import pytest

from bench.soak import summary, watch

pytestmark = pytest.mark.faults
MINUTES = 3


def test_memory_and_open_files_of_a_training_stay_flat(tmp_path):
    soak = summary(watch(tmp_path, MINUTES))
    assert soak.steps > 100
    assert soak.open_files_growth == 0
    assert soak.resident_growth < 0.03  # the allocator still settles in the first minutes
