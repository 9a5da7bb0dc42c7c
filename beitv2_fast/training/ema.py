"""The moving average of a model's weights, which often classifies better than the weights themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class ModelEMA:
    """A second model whose weights follow those of a model in training: w <- d w + (1 - d) w_trained.

    d is ``decay``, but (1 + step) / (10 + step) where that is less: the average of a short training, or of the first
    steps of a long one, would otherwise still be the initial weights. Every rank has all of it, under ZeRO 3 too.

    Args:
        model: on its device, before any wrapper.
        decay: 0 .. 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(
        self, trained: nn.Module, step: int, whole: Callable[[nn.Parameter], AbstractContextManager] | None = None
    ) -> None:
        """After an optimizer's step, the ``step``-th from 1, on every rank.

        Args:
            whole: around a parameter, in which it has all of its values (ZeRO 3 leaves a part on each rank); None: they
                are there.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        own: list[Tensor] = list(self.model.parameters())
        if whole is None:
            torch._foreach_lerp_(own, [p.detach().to(own[0].dtype) for p in trained.parameters()], share)
            return
        for average, parameter in zip(own, trained.parameters(), strict=True):
            with whole(parameter):
                average.lerp_(parameter.detach().to(average.dtype), share)
