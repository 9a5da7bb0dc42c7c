"""Parameter groups (no decay, layer decay) and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config.training import TrainConfig
from ..data.sampler import check_batch


def no_weight_decay(model: nn.Module) -> set[str]:
    """The names that the model's parts give themselves in a method ``no_weight_decay``."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def parameter_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0, skip: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups for AdamW: biases, norms, layer scales and the names in ``skip`` are not decayed.

    With ``layer_decay`` < 1 layer i of n (embeddings 0, block i is i + 1, the rest n + 1) gets
    ``lr_scale = layer_decay ** (n + 1 - i)``; multiply the learning rate of a group by it.

    Returns:
        dicts with params, names, weight_decay, lr_scale, in the order in which the model names its parameters.
    """
    num_layers = len(model.blocks) if layer_decay < 1.0 else 0
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.dim() > 1 and not name.endswith("bias") and name not in skip
        layer = _layer_of(name, num_layers) if layer_decay < 1.0 else 0
        scale = layer_decay ** (num_layers + 1 - layer) if layer_decay < 1.0 else 1.0
        group = groups.setdefault(
            (decayed, layer),
            {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_of(name: str, num_layers: int) -> int:
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers + 1


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
class Plan:
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

    @classmethod
    def of(cls, config: TrainConfig, num_images: int, world_size: int) -> Plan:
        on_a_rank = config.batch_size * config.accumulate
        check_batch(num_images, on_a_rank, world_size)
        images = on_a_rank * world_size  # a step
        total = -(-config.epochs * num_images // images)
        warmup = min(round(config.warmup_epochs * num_images / images), total)
        return cls(
            num_images, images, config.epochs, total, warmup, config.lr * images / config.lr_batch, config.min_lr
        )

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
