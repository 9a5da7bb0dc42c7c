"""What a stage brings to the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Tensor]
ON_HOST = ("index", "view")  # say which images a batch holds: the host reads them, and need not wait for them
# After an epoch, on every rank: the step, the models to look at by name, and what tells that it goes on.
AfterEpoch = Callable[[int, dict[str, Any], Callable[[], None]], object]


class Task:
    """What a stage brings: its model, what a step does with a batch, what it tells the log."""

    name: str
    model: nn.Module

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and scalars for the log. ``model`` is the wrapped model: call it, not ``self.model``."""
        raise NotImplementedError(f"{type(self).__name__} must have a method loss: what a step learns from a batch.")

    def prepare(self, micro_batches: list[Batch]) -> None:
        """Before a first step of several micro-batches: what must see them all at once."""
        return

    def inputs(self, batch: Batch) -> Batch:
        """What a captured step reads of a batch: with that which only the host can look up."""
        return batch

    def report(self) -> dict[str, Tensor]:
        """Further scalars over the window since the last line of the log, fp64, where they are."""
        return {}

    def line(self, metrics: dict[str, float]) -> str:
        """The stage's part of a console line."""
        raise NotImplementedError(f"{type(self).__name__} must have a method line: what the console says of a step.")

    def warning(self, metrics: dict[str, float], steps: int) -> str | None:
        """What is wrong with the numbers of a line, which cover so many steps, and what to try."""
        return None

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures [3, H, W] in [0, 1] for TensorBoard, of a batch of one image."""
        return {}
