"""How a training steps: which parameters decay, the learning rate of every step, and AdamW with plain torch on one
process or several. ``deepspeed`` has the same methods with DeepSpeed.

A checkpoint knows neither: it holds whole weights and whole optimizer states by parameter name, so any number of ranks,
any ZeRO stage and plain torch go on from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.training import TrainConfig
from ..data.draws import check_batch
from ..distributed import World, autocast_dtype
from ..errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, in torch's names
STEP = "step"  # and how many steps it took, the same for all parameters
SCALE = "loss_scale"  # the state of a ``LossScale``
START_SCALE = 2.0**16
GROWS_AFTER = 2000  # steps


def parameter_groups(model: Any, weight_decay: float, *, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW. Biases, norms, layer scales are not decayed, nor what the model's parts name themselves in a
    method ``no_weight_decay``.

    With ``layer_decay`` < 1 layer i of n (see ``ViT.layer_of``) gets ``lr_scale = layer_decay ** (n + 1 - i)``, by
    which the learning rate of a group is to be multiplied.

    Returns:
        dicts with params, names, weight_decay, decayed, lr_scale, in the order in which the model names its parameters.
    """
    spared = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.dim() > 1 and not name.endswith("bias") and name not in spared
        layer = model.layer_of(name) if layer_decay < 1.0 else 0
        scale = layer_decay ** (len(model.blocks) + 1 - layer) if layer_decay < 1.0 else 1.0
        group = groups.setdefault(
            (decayed, layer),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "decayed": decayed,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def cosine_schedule(
    step: int, *, peak: float, final: float, total_steps: int, warmup_steps: int, start: float = 0.0
) -> float:
    """Learning rate of a step (from 0): a line from ``start`` to ``peak``, then half a cosine to ``final``.

    ``final + (peak - final) / 2 * (1 + cos(pi i / n))`` for step i of the n after the warm-up.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - 1, 1)
    i, n = step - warmup_steps, max(total_steps - warmup_steps, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(i / n, 1.0)))


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of a training: as many steps as it takes to see every image in every epoch.

    The epochs follow one another without a gap (see ``EpochSampler``), so only the last step may have images of one
    epoch more. The reference drops what is left of every epoch instead.
    """

    images: int
    images_per_step: int
    epochs: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    decay: tuple[float, float] | None = None  # the weight decay at the start and at the end; None: it stays

    @classmethod
    def of(cls, config: TrainConfig, num_images: int, world_size: int) -> Schedule:
        on_a_rank = config.batch_size * config.accumulate
        check_batch(num_images, on_a_rank, world_size)
        images = on_a_rank * world_size  # per step
        total = -(-config.epochs * num_images // images)
        warmup = min(round(config.warmup_epochs * num_images / images), total)
        end = config.weight_decay_end
        decay = None if end is None else (config.weight_decay, end)
        peak = config.lr * images / config.lr_batch
        return cls(num_images, images, config.epochs, total, warmup, peak, config.min_lr, decay)

    def epoch(self, step: int) -> float:
        """How many epochs the first ``step`` steps are."""
        return min(step * self.images_per_step / self.images, self.epochs)

    def ended_epoch(self, step: int) -> int:
        """The number, from 1, of the epoch whose last image was in this step, the step-th from 1; 0 if there is none.

        No step has more images than an epoch.
        """
        before, now = ((k * self.images_per_step) // self.images for k in (step - 1, step))
        return now if now > before else 0

    def lr(self, step: int) -> float:
        return cosine_schedule(
            step,
            peak=self.peak_lr,
            final=min(self.min_lr, self.peak_lr),
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
        )

    def set_weight_decay(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Of the parameters that decay, if it changes: a cosine from the first value to the second, no warm-up."""
        if self.decay is not None:
            value = cosine_schedule(
                step, peak=self.decay[0], final=self.decay[1], total_steps=self.total_steps, warmup_steps=0
            )
            for group in optimizer.param_groups:
                if group["decayed"]:
                    group["weight_decay"] = value


class LossScale:
    """A power of 2 that the loss is multiplied by and its gradient divided by, where a training computes in fp16.

    A step whose gradient is not finite halves it, so many steps in a row with a finite one double it: the rule and the
    numbers of torch.amp.GradScaler. What counts here is the norm of the gradient, which DeepSpeed tells too. It stays
    on the device, and no step waits for it.
    """

    def __init__(self, precision: str, device: torch.device):
        self.used = autocast_dtype(precision, device) == torch.float16
        self.state = torch.tensor([START_SCALE, 0.0], device=device)  # the scale, and finite steps since it changed

    def numbers(self) -> dict[str, Tensor]:
        """The scale, for the log."""
        return {SCALE: self.state[0].clone()} if self.used else {}

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.state[0] if self.used else loss

    def unscale_(self, gradients: list[Tensor]) -> None:
        if self.used:
            torch._foreach_mul_(gradients, 1 / self.state[0])

    def update(self, finite: Tensor) -> None:
        """After a step: whether the norm of its gradient was finite."""
        if not self.used:
            return
        scale, steps = self.state
        grows = steps + 1 >= GROWS_AFTER
        kept = torch.stack([torch.where(grows, 2 * scale, scale), torch.where(grows, 0.0, steps + 1)])
        self.state.copy_(torch.where(finite.to(scale.device), kept, torch.stack([scale / 2, 0 * steps])))

    def saved(self) -> dict[str, Tensor]:
        """Its part of the optimizer's state."""
        return {SCALE: self.state} if self.used else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``saved`` returned; where a checkpoint was trained without a scale, it starts anew."""
        self.state.copy_(state.get(SCALE, self.state))


class TorchBackend:
    """AdamW on one process, or DistributedDataParallel on several."""

    name = "torch"

    @staticmethod
    def check(config: TrainConfig, device: torch.device) -> None:
        """UserError if this backend cannot do here what the config says."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig, world: World):
        self.model, self.clip, self.accumulate = model, config.clip_grad, config.accumulate
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = adamw(groups, config)
        self.scale = LossScale(config.precision, world.device)
        self.wrapped: Any = model
        self.no_sync: Callable[[], AbstractContextManager] = nullcontext
        if world.size > 1:
            # The codebook is a buffer that every rank computes to the same bits: nothing to broadcast. DDP orders the
            # gradients anew after its first step, unless it looks for unused ones; of three ranks and more the order
            # decides how sums are rounded, and a resumed run would not end with an undisturbed one's bits.
            keeps_order = world.device.type == "cpu" and world.size > 2
            self.wrapped = nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, find_unused_parameters=keeps_order
            )
            self.no_sync = self.wrapped.no_sync
        if config.compile:
            self.wrapped = torch.compile(self.wrapped)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: in the last one of a step the gradients of all ranks meet."""
        return nullcontext() if last else self.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the step's loss."""
        self.scale.scaled(loss / self.accumulate).backward()

    def step(self, lr: float | Tensor) -> Tensor:
        """Clip and step; returns the gradient's norm before clipping. If it is not finite, nothing is changed.

        The device sees to that, by AdamW's ``found_inf``: the host does not wait for the norm.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.scale.unscale_(gradients)
        norm = nn.utils.get_total_norm(gradients)
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        set_lr(self.optimizer, lr)
        vars(self.optimizer)["found_inf"] = norm.isfinite().logical_not().float()
        self.optimizer.step()
        self.scale.update(norm.isfinite())
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    @property
    def whole(self) -> Callable[[nn.Parameter], AbstractContextManager] | None:
        """Around a parameter, in which every rank has all of its values; None where it always has."""
        return None

    def weights(self) -> dict[str, Tensor]:
        """All parameters and persistent buffers. Every rank calls it; complete on rank 0."""
        return self.model.state_dict()

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments as PARAMETER.exp_avg and PARAMETER.exp_avg_sq, step, and the loss scale where there is one.
        Called and complete likewise."""
        state = self.scale.saved()
        for name, parameter in trained(self.model):
            own = self.optimizer.state[parameter]
            state.update({f"{name}.{key}": own[key] for key in MOMENTS})
            state[STEP] = own[STEP]
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what ``optimizer_state`` returned, on whatever backend."""
        set_state(self.optimizer, self.model, state)
        self.scale.restore(state)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that have an optimizer state, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def set_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give an optimizer of whole parameters the state that ``optimizer_state`` returned."""
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
