"""Steps whose loss or gradient is NaN or Inf: skipped, counted, reported, and the end of the training if they go on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import save_weights
from .distributed import World
from .errors import UserError
from .run import RunFolder

Batch = dict[str, Tensor]


def poisoned(loss: Tensor) -> Tensor:
    """The loss; if it is NaN or Inf, its gradient is NaN everywhere, which the sum over ranks tells all of them.

    So every rank skips the same steps, with no message beside the gradient.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Undo:
    """The buffers that a forward changes (codebook, statistics), to put back after a step that did not count."""

    def __init__(self, model: nn.Module):
        stored = model.state_dict().keys()
        self.model = model
        self.buffers = {name: b.clone() for name, b in model.named_buffers() if name in stored}

    def __call__(self) -> None:
        # Through load_state_dict, which tells modules that keep a copy of a buffer's value elsewhere.
        self.model.load_state_dict(self.buffers, strict=False)


class BadSteps:
    """Counts bad steps. All ranks see the same ones (see ``poisoned``).

    Args:
        limit: so many in a row end the training. skipped: how many there were before this process started.
        paths: the images' names, by index.
    """

    def __init__(self, run: RunFolder, world: World, limit: int, skipped: int, paths: list[str]):
        self.run, self.world, self.limit, self.paths = run, world, limit, paths
        self.skipped, self.in_a_row = skipped, 0
        self._first: tuple[int, float, Batch] | None = None

    def good(self) -> None:
        self.in_a_row, self._first = 0, None

    def bad(self, step: int, loss: float, norm: float, batch: Batch) -> None:
        """Count and report one; UserError if it was one too many. ``loss`` is this rank's."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self._first is None or (math.isfinite(self._first[1]) and not math.isfinite(loss)):
            self._first = step, loss, batch
        self.run.print(
            f"step {step} skipped: the loss is {loss} on rank {self.world.rank}, the gradient's norm {norm}; weights "
            f"and codebook stay as they were ({self.in_a_row} in a row, {self.skipped} in all)"
        )
        if self.in_a_row >= self.limit:
            self.stop(step)

    def stop(self, step: int) -> None:
        """Write the first bad batch of the row, on the ranks where it was, and raise UserError. Every rank calls it."""
        mine = not math.isfinite(self._first[1])
        write = not self.world.any(mine) or mine  # the collective first: every rank has to take part
        said = f"The first batch that did it, with its images' names, is in {self.write()}. " if write else ""
        raise UserError(
            f"the loss or its gradient was NaN or Inf in {self.in_a_row} steps in a row, the last being {step}. "
            "Nothing was saved since they began: the last checkpoint is good, and the same command resumes from it. "
            f"{said}Otherwise lower --lr, lengthen --warmup-epochs, or use --precision fp32."
        )

    def write(self) -> Path:
        """That batch as safetensors, its images' names in the file's metadata."""
        step, loss, batch = self._first
        file = self.run.path / f"bad_batch_step_{step:08d}_rank_{self.world.rank}.safetensors"
        names = [self.paths[i] for i in batch["index"].tolist()] if "index" in batch else []
        save_weights(batch, file, {"step": str(step), "loss": str(loss), "images": json.dumps(names)})
        return file
