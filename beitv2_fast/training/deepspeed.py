"""Training with DeepSpeed: the settings of its JSON that are ours to fill in, and how its state comes together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.training import TrainConfig
from ..distributed import World, autocast_dtype
from ..errors import UserError, require
from .optim import MOMENTS, STEP, LossScale, adamw, set_lr, set_state, trained


class DeepSpeedBackend:
    """DeepSpeed's engine: ZeRO and offload, from a JSON file of the user's. The methods are those of TorchBackend."""

    @staticmethod
    def check(config: TrainConfig, device: torch.device) -> None:
        if device.type == "cpu":  # found by itself with a warning, or passed by for a GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        require("deepspeed", "deepspeed", "Training with DeepSpeed")
        deepspeed_settings(config, device)

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig, world: World):
        deepspeed = require("deepspeed", "deepspeed", "Training with DeepSpeed")
        # Its shared-memory all-reduce for CPUs would be compiled now, for half a minute; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self.world, self.gather = model, world, deepspeed.zero.GatheredParameters
        self.base = adamw(groups, config)
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self.base, config=deepspeed_settings(config, world.device)
        )
        if config.compile:
            self.wrapped.compile()
        self.stage = int(self.wrapped.zero_optimization_stage())
        self.name = f"DeepSpeed ZeRO {self.stage}"
        # DeepSpeed's own scalers clip the scaled gradient, and every parameter group updates them anew.
        self.scale = LossScale(config.precision, world.device)
        self.wrapped.torch_autocast_z0_gradscaler = self.optimizer.torch_autocast_gradscaler = None
        if self.stage > 0:
            self._start_moments()

    def micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext()  # the engine counts micro-batches itself

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.stage == 0:
            loss = self.scale.scaled(loss)
        elif self.scale.used:
            self.optimizer.override_loss_scale(self.scale.state[0].item())
        self.wrapped.backward(loss)
        if not last:
            self.wrapped.step()  # only counts

    def step(self, lr: float | Tensor) -> Tensor:
        set_lr(self.optimizer, lr)
        if self.stage == 0:  # the engine would take a step of NaN; from stage 1 on it skips it
            gradients = [p.grad for _, p in trained(self.model) if p.grad is not None]
            self.scale.unscale_(gradients)
            norm = nn.utils.get_total_norm(gradients)
            vars(self.base)["found_inf"] = norm.isfinite().logical_not().float()
        self.wrapped.step()
        if self.stage > 0:
            norm = torch.as_tensor(self.wrapped.get_global_grad_norm())
        self.scale.update(norm.isfinite())
        return norm

    @property
    def whole(self) -> Callable[[nn.Parameter], AbstractContextManager] | None:
        return (lambda parameter: self.gather([parameter])) if self.stage == 3 else None

    def weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        whole = {name: tensor for name, tensor in self.model.state_dict().items() if name not in parameters}
        for name, parameter in parameters.items():  # one by one: a GPU need not hold them all
            with self.gather([parameter]):
                if self.world.rank == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self.scale.saved()
        for name, parameter in trained(self.model):
            for key in MOMENTS:
                if self.stage == 0:
                    whole = self.base.state[parameter][key]
                else:
                    whole = safe_get_full_optimizer_state(parameter, key)
                if self.world.rank == 0:
                    state[f"{name}.{key}"] = whole.detach().cpu()
        return {**state, STEP: next(iter(self.base.state.values()))[STEP]}

    def restore(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.scale.restore(state)
        if self.stage == 0:
            return set_state(self.base, self.model, state)
        for name, parameter in trained(self.model):
            for key in MOMENTS:
                value = state[f"{name}.{key}"].to(self.world.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._partition(value, parameter), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for own in self.base.state.values():
            own[STEP].copy_(state[STEP])

    def _partition(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a whole value under ZeRO 3, filled up with zeros where the ranks do not divide it.

        DeepSpeed's own setter of whole values fails there (a head of 150 classes on 8 ranks).
        """
        size = parameter.ds_tensor.numel()
        whole = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        return whole[size * self.world.rank :][:size]

    def _start_moments(self) -> None:
        """AdamW's state before its first step, in the flat part of the weights that this rank's optimizer sees.

        DeepSpeed would link the parameters to it when the first parameter group has taken its first step, and so lose
        that of the others.
        """
        if self.stage == 3:
            partitions = self.optimizer.fp32_partitioned_groups_flat
        else:
            partitions = self.optimizer.single_partition_of_fp32_groups
        for partition in partitions:
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            self.base.state[partition] = {STEP: torch.zeros((), device=partition.device), **moments}
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()


def deepspeed_settings(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The user's JSON, completed by what the training's own options say.

    Mixed precision is --precision's: DeepSpeed's ``torch_autocast`` follows it (the engine would otherwise switch the
    autocast of the training loop off), and its ``bf16`` and ``fp16`` sections, which convert the weights, are refused.
    """
    file, settings = config.deepspeed_config, {}
    if file is not None:
        try:
            settings = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--deepspeed-config {file} cannot be read: {error}. It must be a JSON file.") from error
        if not isinstance(settings, dict):
            raise UserError(f"--deepspeed-config {file} must hold a JSON object; it holds a {type(settings).__name__}.")
    for section in ("bf16", "fp16"):
        if settings.get(section, {}).get("enabled"):
            raise UserError(f"{file} enables {section}. Leave it out: the precision follows from --precision.")
    for part in ("offload_optimizer", "offload_param"):
        if settings.get("zero_optimization", {}).get(part, {}).get("device") == "nvme":
            raise UserError(
                f'{file} has {part} to nvme, from which checkpoints have never been tried here. Use "device": "cpu".'
            )
    if "optimizer" in settings or "scheduler" in settings:
        raise UserError(f"{file} sets an optimizer or scheduler. Leave both out: they follow from --lr, --betas, ...")
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip_grad,
    }
    for name, value in owned.items():
        if settings.get(name, value) != value:
            raise UserError(
                f"{file} says {name} = {settings[name]}, the options say {value}. "
                "Leave it out of the JSON: it follows from the options (--batch-size, --accumulate, --clip-grad)."
            )
    dtype = autocast_dtype(config.precision, device)
    autocast = {"enabled": dtype is not None, "dtype": str(dtype or torch.bfloat16).removeprefix("torch.")}
    owned["torch_autocast"] = {**settings.get("torch_autocast", {}), **autocast}
    return {"zero_optimization": {"stage": 0}, "steps_per_print": 10**9, **settings, **owned}


def zero_stage(config: TrainConfig, device: torch.device) -> int:
    return int(deepspeed_settings(config, device)["zero_optimization"].get("stage", 0))
