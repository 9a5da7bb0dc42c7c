"""Configs of what comes after pre-training: fine-tuning and the evaluation of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import OUT, RunConfig, TrainConfig, option


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Fine-tuning of a classifier (arXiv 2208.06366 section 3.2)."""

    out: Path = option(Path("runs/finetune"), OUT)
    weights: Path | None = option(
        Path("runs/pretrain"),
        "where the training starts: the run folder of a pre-training, of a tokenizer (its encoder is fine-tuned) or of "
        "another fine-tuning (a new head if its classes are others), or a file of weights in any format of "
        "`beitv2-fast convert`; none: random weights",
    )
    val: Path | None = option(
        None, "labelled images to evaluate on: a folder of class folders, or shards; none: FOLDER/val or FOLDER/test "
        "of --data, if there is one", free=True,
    )  # fmt: skip
    evaluate: bool = option(False, "no training: evaluate the newest checkpoint of --out", free=True)
    eval_every: int = option(
        1, "epochs between evaluations of the weights and of their average; the last is always evaluated", free=True,
        at_least=1,
    )  # fmt: skip
    eval_batch_size: int = option(128, "images a forward of the evaluation on each rank", free=True, at_least=1)
    crop_pct: float = option(
        0.875, "share of the shorter side that the evaluation's centre crop shows", free=True, above=0, at_most=1
    )
    layer_decay: float = option(
        0.65, "each block learns at this times the rate of the next; the head at the full rate", above=0, at_most=1
    )
    layer_scale: float = option(
        0.1, "initial scale of every residual branch, without --weights; 0: no layer scale", at_least=0
    )
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "least and largest area of the random crop, as a share of the image", above=0, at_most=1
    )
    augment_ops: int = option(2, "RandAugment's operations on each image; 0: none", at_least=0)
    augment_magnitude: int = option(9, "strength of these operations", at_least=0, at_most=30)
    erasing: float = option(0.25, "how often a rectangle of an image becomes noise", at_least=0, at_most=1)
    mixup: float = option(0.8, "mixup's alpha; 0: no mixup", at_least=0)
    cutmix: float = option(1.0, "cutmix's alpha; 0: no cutmix. With both, a batch gets either by chance", at_least=0)
    smoothing: float = option(
        0.1, "label smoothing: the share of a label that all classes divide", at_least=0, at_most=1
    )
    ema_decay: float = option(
        0.9999, "of the moving average of the weights, saved and evaluated beside them; 0: none", at_least=0, below=1
    )

    @property
    def from_scratch(self) -> bool:
        return self.weights is None or str(self.weights) == "none"


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """Top-1 and top-5 of a classifier on folders of images, such as ImageNet-A, ImageNet-R and ImageNet-Sketch.

    A folder may have some of the classifier's classes alone: it then chooses among these.
    """

    out: Path = option(Path("runs/evaluate"), "run folder for results.json and the log")
    model: Path = option(
        Path("runs/finetune"), "run folder of a fine-tuning, or a file of a classifier's weights in any format"
    )
    data: tuple[Path, ...] = option(
        (Path("data/val"),), "folders of class folders, named as the training's; also tar shards"
    )
    classes: Path | None = option(
        None, "the classifier's classes in its order: a folder of class folders (the training's), or a text file with "
        "a name a line; none: those that a fine-tuning wrote into its run folder"
    )  # fmt: skip
    image_size: int | None = option(
        None, "side of the images, in pixels, to which positions are resized; none: that of the training", at_least=1
    )
    crop_pct: float = option(0.875, "share of the shorter side that the centre crop shows", above=0, at_most=1)
    precision: str = option(
        "auto", "arithmetic; bf16: autocast; auto: bf16 on GPUs and CPUs with AMX, else fp32",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    loader: str = option("auto", "what decodes the images", choices=("auto", "dali", "torchvision"))
    batch_size: int = option(128, "images a forward on each rank", free=True, at_least=1)
