"""The number of steps of a training: every epoch ends once, however many images a step has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beitv2_fast.config.training import TrainConfig
from beitv2_fast.errors import DataError
from beitv2_fast.training.optim import Schedule


@given(st.integers(1, 300), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_the_steps_are_as_many_as_all_epochs_need_and_each_epoch_ends_once(images, batch, accumulate, ranks, epochs):
    config = TrainConfig(batch_size=batch, accumulate=accumulate, epochs=epochs)
    step = batch * accumulate * ranks
    if step > images:
        with pytest.raises(DataError, match="larger than the data set"):
            Schedule.of(config, images, ranks)
        return
    plan = Schedule.of(config, images, ranks)
    assert 0 <= plan.total_steps * step - epochs * images < step
    ends = {plan.ended_epoch(k): k for k in range(1, plan.total_steps + 1) if plan.ended_epoch(k)}
    assert list(ends) == list(range(1, epochs + 1))
    assert all(0 <= k * step - epoch * images < step for epoch, k in ends.items())
    assert plan.epoch(plan.total_steps) == epochs


def test_the_warm_up_takes_its_epochs_and_never_more_than_there_are():
    plan = Schedule.of(replace(TrainConfig(), batch_size=4, epochs=10, warmup_epochs=2.5), 10, 1)
    assert (plan.total_steps, plan.warmup_steps) == (25, 6)
    assert Schedule.of(replace(TrainConfig(), batch_size=4, epochs=1, warmup_epochs=9), 10, 1).warmup_steps == 3
