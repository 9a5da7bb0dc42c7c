"""The moving average of the weights."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from beitv2_fast.training.ema import ModelEMA


def walk(model: nn.Module, ema: ModelEMA, steps: int, **values) -> None:
    torch.manual_seed(1)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, step, **values)


def test_the_average_is_the_recursion_with_a_shorter_memory_at_the_start():
    model = nn.Linear(3, 2).double()
    ema, expected = ModelEMA(model, 0.7), model.weight.detach().clone()
    torch.manual_seed(0)
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update(model, step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected, rtol=1e-12, atol=1e-12)


def test_the_average_follows_without_gradients_and_leaves_the_model_alone():
    model = nn.Linear(3, 2)
    ema = ModelEMA(model, 0.9)
    before = model.weight.detach().clone()
    ema.update(model, 1)
    assert torch.equal(model.weight, before) and model.weight.requires_grad
    assert not ema.model.weight.requires_grad and not ema.model.training and model.training


def test_weights_that_have_to_be_gathered_give_the_same_average():
    gathered = []

    @contextmanager
    def whole(parameter):
        gathered.append(parameter.shape)
        yield

    runs = []
    for values in ({}, {"whole": whole}):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        ema = ModelEMA(model, 0.9)
        walk(model, ema, 5, **values)
        runs.append(ema.model.state_dict())
    assert len(gathered) == 10
    for name, value in runs[0].items():
        assert value.tolist() == [pytest.approx(v, rel=1e-6) for v in runs[1][name].tolist()]
