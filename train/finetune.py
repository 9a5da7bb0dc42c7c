"""Fine-tune a classifier: ``deepspeed train/finetune.py --preset base --data IMAGENET --weights RUN_OR_FILE``.

Also under ``torchrun`` and plain ``python``. Stopped and started again with the same options, it goes on where it was.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast.config.downstream import FinetuneConfig
from beitv2_fast.config.presets import FINETUNE
from beitv2_fast.data.images import ImageList
from beitv2_fast.data.views import FinetuneView
from beitv2_fast.distributed import World, run_main
from beitv2_fast.downstream.augment import BatchAugment
from beitv2_fast.downstream.classification import (
    ClassifierValidation,
    load_classifier,
    start_model,
    store_classes,
    stored_classes,
    validation_images,
)
from beitv2_fast.downstream.evaluation import columns_of
from beitv2_fast.errors import UserError
from beitv2_fast.models.classifier import Classifier
from beitv2_fast.models.vit import normalize
from beitv2_fast.teachers.classifier import TeacherClassifier
from beitv2_fast.training.images import found_images, training_images
from beitv2_fast.training.launch import evaluate_newest, launched, open_run
from beitv2_fast.training.loop import train
from beitv2_fast.training.task import Batch, Task


class FinetuneTask(Task):
    """Augmented images -> soft targets' cross entropy ``-sum_k t_k log softmax(logits)_k``."""

    name = "finetune"

    def __init__(self, model: Classifier | TeacherClassifier, augment: BatchAugment):
        self.model, self.augment = model, augment

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = self.augment(normalize(batch["image"]), batch["label"])
        logits = model(images).float()
        right = logits.argmax(-1) == targets.argmax(-1)
        return F.cross_entropy(logits, targets), {"accuracy": right.float().mean()}

    def line(self, metrics: dict[str, float]) -> str:
        return f"classes right {metrics['accuracy']:.1%}"

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"augmented": batch["image"][0]}


def _evaluate(config: FinetuneConfig, world: World) -> int:
    """--evaluate: the newest checkpoint's weights and their average."""
    classes = stored_classes(config.out)
    if classes is None:
        raise UserError(f"--evaluate: {config.out} has no finished step of a fine-tuning in it.")
    if validation_images(config) is None:
        raise UserError(f"--evaluate: {config.data} has no images to evaluate on. Give --val.")
    kinds = ("weights", "average") if config.ema_decay else ("weights",)
    models = {kind: load_classifier(config.out, average=kind == "average")[0] for kind in kinds}
    return evaluate_newest(config, world, models, lambda run: ClassifierValidation(config, classes, run, world))


def main(argv: list[str] | None = None) -> int:
    config, world, backend = launched(FinetuneConfig, FINETUNE, argv)
    if config.evaluate:
        return _evaluate(config, world)
    start_model(config, ["", ""], lambda _: None)  # what does not fit is told before all images have been decoded
    try:
        policy = config.augment_policy if config.augment_ops else "none"
        view = FinetuneView(config.image_size, config.crop_scale, config.augment_ops, config.augment_magnitude, policy)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}. Change one of these options.") from error
    run = open_run(config, world, backend)
    evaluated = validation_images(config)

    def before(images: ImageList) -> None:
        if len(images.classes) < 2:
            raise UserError(
                f"{images.root} needs at least two class folders, each with images, for fine-tuning, or shards with "
                "labels."
            )
        store_classes(run, images.classes)
        if evaluated is not None:
            others = found_images(*evaluated, run, world, name="_val", labeled=True)
            columns_of(others, images.classes, others.root)

    dataset = training_images(config, view, run, world, labeled=True, before=before)
    classes = dataset.images.classes
    torch.manual_seed(config.seed)
    model = start_model(config, classes, run.print)
    augment = BatchAugment(
        len(classes), mixup=config.mixup, cutmix=config.cutmix, smoothing=config.smoothing, erasing=config.erasing
    )
    validation = None
    if evaluated is not None:
        validation = ClassifierValidation(config, classes, run, world)
    else:
        run.print("no images to evaluate on: neither --val nor a folder val or test in --data")

    return train(
        FinetuneTask(model, augment),
        config,
        dataset,
        run,
        world,
        backend,
        layer_decay=config.layer_decay,
        ema_decay=config.ema_decay,
        after_epoch=validation,
        every_epochs=config.eval_every,
    )


if __name__ == "__main__":
    run_main(main)
