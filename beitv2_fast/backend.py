"""What differs between training with plain torch (one process or DDP) and with DeepSpeed: five methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_model, read_weights, save_weights
from .config import TrainConfig
from .distributed import World, autocast_dtype
from .errors import CheckpointError, UserError, require


class TorchBackend:
    """AdamW on one process, or DistributedDataParallel on several."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig, world: World):
        self.model, self.clip = model, config.clip_grad
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = adamw(groups, config)
        self.wrapped: nn.Module = model
        if world.size > 1:
            # The codebook is a buffer that every rank computes to the same bits: nothing to broadcast.
            self.wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        if config.compile:
            self.wrapped = torch.compile(self.wrapped)

    def step(self, loss: Tensor, lr: float) -> Tensor:
        """Backward, clip, step. Returns the norm of the gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf"))
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        return norm

    def save(self, folder: Path, world: World) -> None:
        if world.rank == 0:
            save_weights(self.model.state_dict(), folder / "model.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        load_model(self.model, read_weights(folder / "model.safetensors"), str(folder))
        if not (folder / "optimizer.pt").is_file():
            raise CheckpointError(f"{folder} was written under DeepSpeed: resume it with the `deepspeed` launcher")
        self.optimizer.load_state_dict(read_weights(folder / "optimizer.pt"))


class DeepSpeedBackend:
    """DeepSpeed's engine: ZeRO, offload and its checkpoints, from a JSON file of the user's."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig, world: World):
        deepspeed = require("deepspeed", "deepspeed", "Training with DeepSpeed")
        # Its shared-memory all-reduce for CPUs would be compiled now, for half a minute; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model = model
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=adamw(groups, config), config=deepspeed_settings(config, world.device)
        )
        if config.compile:
            self.wrapped.compile()

    def step(self, loss: Tensor, lr: float) -> Tensor:
        self.wrapped.backward(loss)
        set_lr(self.optimizer, lr)
        self.wrapped.step()
        return torch.as_tensor(self.wrapped.get_global_grad_norm() or 0.0)

    def save(self, folder: Path, world: World) -> None:
        if self.wrapped.zero_optimization_partition_weights():  # ZeRO-3: no rank has all weights
            state = self.wrapped._zero3_consolidated_16bit_state_dict()
            buffers = {name: b for name, b in self.model.state_dict().items() if name not in (state or {})}
            if world.rank == 0:
                save_weights({**buffers, **state}, folder / "model.safetensors")
        elif world.rank == 0:
            save_weights(self.model.state_dict(), folder / "model.safetensors")
        self.wrapped.save_checkpoint(str(folder / "deepspeed"), tag="state")

    def load(self, folder: Path) -> None:
        if not (folder / "deepspeed").is_dir():
            raise CheckpointError(f"{folder} was written without DeepSpeed: resume it with plain python or torchrun")
        with weights_only_loads():
            self.wrapped.load_checkpoint(str(folder / "deepspeed"), tag="state")
        # DeepSpeed leaves buffers of a frozen or partitioned model to the user: the codebook comes from the weights.
        stored = read_weights(folder / "model.safetensors")
        for name, buffer in self.model.named_buffers():
            if name in stored:
                buffer.copy_(stored[name])


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
    if "optimizer" in settings or "scheduler" in settings:
        raise UserError(f"{file} sets an optimizer or scheduler. Leave both out: they follow from --lr, --betas, ...")
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_grad,
    }
    for name, value in owned.items():
        if settings.get(name, value) != value:
            raise UserError(
                f"{file} says {name} = {settings[name]}, the options say {value}. "
                "Leave it out of the JSON: it follows from the options (--batch-size, --clip-grad)."
            )
    dtype = autocast_dtype(config.precision, device)
    autocast = {"enabled": dtype is not None, "dtype": str(dtype or torch.bfloat16).removeprefix("torch.")}
    owned["torch_autocast"] = {**settings.get("torch_autocast", {}), **autocast}
    return {"zero_optimization": {"stage": 0}, "steps_per_print": 10**9, **settings, **owned}


def adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on ``parameter_groups``; the learning rate is set before every step."""
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=1e-8, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """DeepSpeed reads its checkpoints with torch.load(weights_only=False), which would run code from the file.

    Inside, every torch.load is weights_only, with DeepSpeed's own harmless state classes allowed.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        kwargs["weights_only"] = True
        return original(*args, **kwargs)

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        torch.load = load
        try:
            yield
        finally:
            torch.load = original
