"""A whole training step of B/16 at 224, of both trainings, beside the same step in the reference's structure.

Both take turns in one test, from the same weights and batch; their first losses must agree.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness import measure_in_turns
from bench.training_steps import PRECISIONS, STAGES, steps

BATCH, ROUNDS = 8, 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_training_step(benchmark, stage, precision):
    both = steps(stage, BATCH, PRECISIONS[precision])
    losses = [step.forward().detach() for step in both.values()]
    torch.testing.assert_close(*losses, rtol=1e-4 if precision == "fp32" else 1e-2, atol=0)
    measure_in_turns(benchmark, f"{stage} step B/16 224 batch {BATCH} {precision}", both, rounds=ROUNDS)
