"""Train a semantic segmentation: ``deepspeed train/segment.py --preset base --data ADE20K --weights RUN_OR_FILE``.

Also under ``torchrun`` and plain ``python``. Stopped and started again with the same options, it goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast.config.downstream import SEGMENT, SegmentConfig
from beitv2_fast.distributed import World, run_main
from beitv2_fast.downstream.segmentation.head import across_ranks, resize
from beitv2_fast.downstream.segmentation.masks import IGNORED, validation_folders
from beitv2_fast.downstream.segmentation.overlays import overlay
from beitv2_fast.downstream.segmentation.training import (
    SegmenterValidation,
    load_segmenter,
    published_segmenter,
    start_segmenter,
    training_folder,
)
from beitv2_fast.errors import UserError
from beitv2_fast.models.vit import normalize
from beitv2_fast.runs.checkpoints import Checkpoints
from beitv2_fast.runs.sources import locate
from beitv2_fast.training.launch import evaluate_newest, launched, open_run
from beitv2_fast.training.loop import train
from beitv2_fast.training.optim import Schedule
from beitv2_fast.training.task import Batch, Task


@dataclass(frozen=True)
class PolySchedule(Schedule):
    """``(peak - min) (1 - step / total) ** power + min``, times ``step / warmup`` in the warm-up: the reference's."""

    power: float = 1.0

    @classmethod
    def of(cls, config: Any, num_images: int, world_size: int) -> PolySchedule:
        values = vars(Schedule.of(config, num_images, world_size))
        if config.steps:
            epochs = -(-config.steps * values["images_per_step"] // num_images)
            warmup = min(config.warmup_steps, config.steps)
            values = {**values, "total_steps": config.steps, "warmup_steps": warmup, "epochs": epochs}
        return cls(**values, power=config.power)

    def lr(self, step: int) -> float:
        low = min(self.min_lr, self.peak_lr)
        rate = (self.peak_lr - low) * max(1 - step / self.total_steps, 0.0) ** self.power + low
        return rate * min(step / self.warmup_steps, 1.0) if self.warmup_steps else rate


class SegmentTask(Task):
    """Crops -> cross entropy of every pixel, ``-log softmax(logits)_label``, summed over those that count, divided by
    all: then the mean over ranks is that of the global batch, whatever each ignores (the reference's average).

    The logits are resized to the crop; ``auxiliary_weight`` times the same of the auxiliary head is added.
    """

    name = "segment"

    def __init__(self, model: nn.Module, auxiliary_weight: float):
        self.model, self.auxiliary_weight = model, auxiliary_weight

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["mask"].long()
        logits, auxiliary = (resize(x.float(), labels.shape[1:]) for x in model(normalize(batch["image"] / 255)))
        losses = [_cross_entropy(x, labels) for x in (logits, auxiliary)]
        counted = labels != IGNORED
        right = ((logits.detach().argmax(1) == labels) & counted).float().sum() / counted.sum().clamp(min=1)
        return losses[0] + self.auxiliary_weight * losses[1], {"loss_decode": losses[0], "accuracy": right}

    def line(self, metrics: dict[str, float]) -> str:
        return f"pixels right {metrics['accuracy']:.1%}"

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        picture, labels = batch["image"][0], batch["mask"][0]
        return {"crop": picture.float() / 255, "labels": overlay(picture, labels).float() / 255}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


def _evaluate(config: SegmentConfig, world: World) -> int:
    """--evaluate: the newest checkpoint, or of a run without any the segmenter in the file of --weights."""
    folders = validation_folders(config.data, config.val)
    if folders is None:
        raise UserError(f"--evaluate: {config.data} has no images to evaluate on. Give --val.")
    trained = config.from_scratch or Checkpoints(config.out / "checkpoints").all()
    published = config.weights is not None and not trained and locate(config.weights).is_file()
    model = published_segmenter(config) if published else load_segmenter(config.out)[0]
    num_classes = model.config.num_classes
    return evaluate_newest(
        config, world, {"weights": model}, lambda run: SegmenterValidation(config, folders, num_classes, run, world)
    )


def main(argv: list[str] | None = None) -> int:
    config, world, backend = launched(SegmentConfig, SEGMENT, argv)
    if config.batch_size * world.size < 2:
        raise UserError("batch norm needs two images at a time. Give --batch-size 2, or start two ranks.")
    if config.evaluate:
        return _evaluate(config, world)
    start_segmenter(config, config.num_classes or 2, lambda _: None)  # what does not fit is told before images are read
    folders = validation_folders(config.data, config.val)
    run = open_run(config, world, backend)
    dataset, num_classes = training_folder(config, run, world)
    schedule = PolySchedule.of(config, len(dataset), world.size)
    torch.manual_seed(config.seed)
    model = across_ranks(start_segmenter(config, num_classes, run.print), world)
    validation = None
    if folders is not None:
        validation = SegmenterValidation(config, folders, num_classes, run, world, schedule.total_steps)
    else:
        run.print("no images to evaluate on: neither --val nor val, validation or test of --data")
    return train(
        SegmentTask(model, config.auxiliary_weight),
        config,
        cast(Any, dataset),  # read like any images
        run,
        world,
        backend,
        layer_decay=config.layer_decay,
        after_epoch=validation,
        every_epochs=config.eval_every,
        schedule=schedule,
    )


if __name__ == "__main__":
    run_main(main)
