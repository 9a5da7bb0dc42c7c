"""What differs between training with plain torch (one process or DDP) and with DeepSpeed: forward, backward and step,
and how the state that is spread over ranks comes together for a checkpoint.

A checkpoint knows neither: it holds whole weights and whole optimiser states by parameter name, so any number of ranks,
any ZeRO stage and plain torch go on from it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.training import TrainConfig
from ..distributed import World
from ..errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, in torch's names
STEP = "step"  # and how many steps it took, the same for all parameters


class TorchBackend:
    """AdamW on one process, or DistributedDataParallel on several."""

    name = "torch"

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig, world: World):
        self.model, self.clip, self.accumulate = model, config.clip_grad, config.accumulate
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = adamw(groups, config)
        self.wrapped: nn.Module = model
        self.no_sync: Callable[[], AbstractContextManager] = nullcontext
        if world.size > 1:
            # The codebook is a buffer that every rank computes to the same bits: nothing to broadcast.
            self.wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
            self.no_sync = self.wrapped.no_sync
        if config.compile:
            self.wrapped = torch.compile(self.wrapped)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: in the last one of a step the gradients of all ranks meet."""
        return nullcontext() if last else self.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the step's loss."""
        (loss / self.accumulate).backward()

    def step(self, lr: float) -> Tensor:
        """Clip and step; returns the gradient's norm before clipping. If it is not finite, nothing is changed."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf"))
        if norm.isfinite():
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def whole(self) -> Callable[[nn.Parameter], AbstractContextManager] | None:
        """Around a parameter, in which every rank has all of its values; None where it always has."""
        return None

    def weights(self) -> dict[str, Tensor]:
        """All parameters and persistent buffers. Every rank calls it; complete on rank 0."""
        return self.model.state_dict()

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments as PARAMETER.exp_avg and PARAMETER.exp_avg_sq, and step. Called and complete likewise."""
        state = {}
        for name, parameter in trained(self.model):
            own = self.optimizer.state[parameter]
            state.update({f"{name}.{key}": own[key] for key in MOMENTS})
            state[STEP] = own[STEP]
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what ``optimizer_state`` returned, on whatever backend."""
        set_state(self.optimizer, self.model, state)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that have an optimiser state, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def set_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give an optimiser of whole parameters the state that ``optimizer_state`` returned."""
    for name, parameter in trained(model):
        moments = {key: state[f"{name}.{key}"].to(parameter.device) for key in MOMENTS}
        optimizer.state[parameter] = {STEP: state[STEP].clone().to(parameter.device), **moments}


def check_optimizer_state(state: dict[str, Tensor], model: nn.Module, source: str) -> None:
    """CheckpointError unless it is that of this model."""
    wanted = {f"{name}.{key}": p.shape for name, p in trained(model) for key in MOMENTS}
    wrong = [name for name, shape in wanted.items() if name not in state or state[name].shape != shape]
    if wrong or STEP not in state:
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}: {', '.join(wrong[:12]) or STEP}")


def adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on ``parameter_groups``; the learning rate is set before every step."""
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=1e-8, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
