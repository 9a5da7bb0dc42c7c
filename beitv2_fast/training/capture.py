"""A training step as one CUDA graph: the host launches it at once instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.training import CapturedConfig, TrainConfig
from ..distributed import World
from ..errors import UserError
from .task import ON_HOST, Batch

if TYPE_CHECKING:
    from .loop import Known

# Good steps before the capture: the codebook starts, AdamW makes its state, kernels are compiled, cuBLAS gets its
# workspace.
WARM_UP = 3


def captures(config: TrainConfig) -> bool:
    return isinstance(config, CapturedConfig) and config.cuda_graph


def check_capture(config: TrainConfig, world: World, deepspeed: bool) -> None:
    """UserError if --cuda-graph is asked for where a step cannot be captured."""
    refused = {
        "the device is the CPU": world.device.type != "cuda",
        f"there are {world.size} processes": world.size > 1,
        "DeepSpeed trains": deepspeed,
        f"--accumulate is {config.accumulate}": config.accumulate > 1,  # each forward has a seed of its own
        "--checkpointing keeps the random numbers' state on the host": config.checkpointing,
        "--weight-decay-end changes a number that is part of the graph": config.weight_decay_end is not None,
    }
    reasons = [reason for reason, applies in refused.items() if applies]
    if captures(config) and reasons:
        raise UserError(
            f"--cuda-graph captures the whole step of one process on a GPU, but {' and '.join(reasons)}. Leave out one."
        )


class CapturedStep:
    """``take(batch, step, lr)``, captured after ``WARM_UP`` good steps in a row and from then on replayed.

    A replay launches the same kernels on the same memory. So batches, which have one shape, are copied to where the
    captured one lay, and the learning rate is a number on the device; random numbers follow from a seed that the graph
    reads when it is replayed. They are those of the step that is not captured, and so is all else, but for the learning
    rate, which is rounded to fp32.

    Args:
        take: forward, backward and the optimizer's step; a dict of scalars. ``step`` is None in the capture: then it
            leaves the generators alone.
        known: what the host knows of the step before. A warm-up and the capture wait for it.
        inputs: what ``take`` reads of a batch (see ``Task.inputs``).
        seed: of a step.
    """

    def __init__(
        self,
        take: Callable[[Batch, int | None, Tensor], dict[str, Tensor]],
        known: Known,
        inputs: Callable[[Batch], Batch],
        seed: Callable[[int], int],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ):
        self.take, self.known, self.inputs, self.seed, self.device = take, known, inputs, seed, device
        for group in optimizer.param_groups:
            group["capturable"] = True
        self.lr = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0

    def __call__(self, batch: Batch, step: int, lr: float) -> dict[str, Tensor]:
        """The step's scalars, on the device until the next step."""
        batch = {name: value for name, value in self.inputs(batch).items() if name not in ON_HOST}
        self.lr.fill_(lr)
        if self.graph is None:
            self.known.learn()
            if self.known.bad.in_a_row:
                self.warm = 0
            if self.warm < WARM_UP:
                return self._warm_up(batch, step)
            self.graph = self._captured(batch)
        for name, value in batch.items():
            self.batch[name].copy_(value, non_blocking=True)
        torch.manual_seed(self.seed(step))
        self.graph.replay()
        return self.metrics

    def _warm_up(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """A step on the stream of the capture, where libraries keep what they make once."""
        self.warm += 1
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            metrics = self.take(batch, step, self.lr)
        current.wait_stream(self.stream)
        return metrics

    def _captured(self, batch: Batch) -> torch.cuda.CUDAGraph:
        self.batch = {name: value.to(self.device, copy=True) for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of the loaders may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.metrics = self.take(self.batch, None, self.lr)
        except RuntimeError as error:
            raise UserError(f"--cuda-graph: the step cannot be captured: {error}. Leave out --cuda-graph.") from error
        return graph
