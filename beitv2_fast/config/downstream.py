"""Configs of what comes after pre-training: probes, fine-tuning and the evaluation of a classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from ..distributed import PRECISIONS
from ..models.vit import SIZES
from .options import OUT, SOURCE, RunConfig, option
from .training import LOADERS, TrainConfig

TEACHER_WEIGHTS = "of teacher:NAME: a file, or a hub name; none: the source of the package that brings the teacher"


@dataclass(frozen=True)
class ProbeConfig(RunConfig):
    """Probes of a frozen backbone."""

    stage: ClassVar[str] = "probe"
    example: ClassVar[str] = "python train/linear_probe.py --run runs/pretrain --out runs/probe"
    out: Path = option(Path("runs/probe"), "run folder for results.json and the log")
    data: Path | None = option(
        None, "folder of FOLDER/train/CLASS and FOLDER/test/CLASS (or val) with images; none: that of --run's training"
    )
    run: Path = option(
        Path("runs/pretrain"), "whose backbone is probed, that of a pre-training, a tokenizer (its encoder) or a "
        f"fine-tuning: {SOURCE}; or teacher:NAME, a teacher as tokenizers have them, at its own image size",
        holds="start",
    )  # fmt: skip
    backbone: str = option(
        "trained", "trained: the network of --run; untrained: one of its shape with random weights; teacher: the "
        "frozen network that the tokenizer of --run, or of --tokenizer, learned from",
        choices=("trained", "untrained", "teacher"),
    )  # fmt: skip
    teacher_weights: str | None = option(None, TEACHER_WEIGHTS, holds="start")
    tokenizer: Path | None = option(
        None, "run folder of a tokenizer, whose teacher --backbone teacher means; with --exact it is probed too; none: "
        "that of --run's training"
    )  # fmt: skip
    protocol: str = option(
        "sweep", "sweep: linear classifiers by SGD on features that are computed once; the others learn by AdamW from "
        "random crops and flips of which the frozen network computes features anew. blocks, as BEiT: a linear "
        "classifier for each block, on its CLS token beside the mean of its patches; concatenated, as DINOv2: one for "
        "the CLS tokens of the last blocks and the mean of the last patches; attentive, as CAPI: a learned query "
        "attends to the patches, then a linear classifier", choices=("sweep", "blocks", "concatenated", "attentive"),
    )  # fmt: skip
    lr: float = option(1e-3, "of a protocol by AdamW, peak for a batch of 256 and scaled in proportion", above=0)
    weight_decay: float = option(1e-4, "of a protocol by AdamW", at_least=0)
    features: str = option(
        "auto",
        "of the sweep; cls: the CLS token, of a pre-training's aggregation branch; mean: the mean of the last layer's "
        "patches; auto: both",
        choices=("auto", "cls", "mean"),
    )
    exact: bool = option(
        False, "of the sweep: also probe by L-BFGS, to convergence and with the penalty chosen, and compare with an "
        "untrained network, pixels and the teacher: for up to some 10,000 images"
    )  # fmt: skip
    evaluate: bool = option(
        False, "fit nothing: evaluate the classifiers of --out on the test images of --data", free=True
    )
    layers: tuple[int, ...] = option(
        (), "blocks, counted from 1: whose CLS token and mean of patches the sweep probes too, each for 2 x dim x 4 "
        "bytes of memory an image; that the protocol blocks probes (none: all) or concatenated joins (none: the last "
        "four)", at_least=1,
    )  # fmt: skip
    learning_rates: tuple[float, ...] = option(
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        "of the sweep, for a batch of 256: all are trained at once on every feature; the best on a fifth of train is "
        "tested", above=0,
    )  # fmt: skip
    epochs: int = option(100, "passes over the images, or of the sweep over their features", at_least=1)
    sgd_batch_size: int = option(1024, "of the sweep, images per step; a small set is cut into ten", at_least=1)
    neighbors: tuple[int, ...] = option((10, 20), "k of the k nearest neighbors", at_least=1)
    shots: tuple[int, ...] = option((1, 5, 10), "images per class of the few-shot probes", at_least=1)
    seeds: int = option(3, "repetitions of the exact and few-shot probes, with other images each", at_least=1)
    batch_size: int = option(
        64, "images per forward pass on each rank; by AdamW also per step, as many in all when it resumes", free=True,
        at_least=1,
    )  # fmt: skip


@dataclass(frozen=True)
class StartConfig(TrainConfig):
    """What the trainings have that start from weights and are evaluated."""

    weights: Path | None = option(
        Path("runs/pretrain"),
        "where the training starts: from a pre-training, a tokenizer (its encoder is trained on), a fine-tuning or, of "
        "a segmentation, another one (with a new head if its classes are others), in any format of `beitv2-fast "
        f"convert`: {SOURCE}; of a fine-tuning also teacher:NAME, a teacher as tokenizers have them, whose shape no "
        "option changes; none: random weights",
        holds="start",
        group="start",
    )
    layer_scale: float = option(
        0.1, "initial scale of every residual branch, without --weights; 0: no layer scale", at_least=0
    )
    evaluate: bool = option(False, "no training: evaluate the newest checkpoint of --out", free=True)

    @property
    def from_scratch(self) -> bool:
        return self.weights is None or str(self.weights) == "none"


@dataclass(frozen=True)
class FinetuneConfig(StartConfig):
    """Fine-tuning of a classifier (arXiv 2208.06366 section 3.2)."""

    stage: ClassVar[str] = "finetune"
    example: ClassVar[str] = (
        "python train/finetune.py --preset demo --data PHOTOS --weights runs/pretrain --out runs/finetune"
    )
    out: Path = option(Path("runs/finetune"), OUT)
    teacher_weights: str | None = option(None, TEACHER_WEIGHTS, holds="start")
    val: Path | None = option(
        None, "labeled images to evaluate on: a folder of class folders, or shards; none: FOLDER/val or FOLDER/test "
        "of --data, if there is one", free=True, group="evaluation",
    )  # fmt: skip
    eval_every: int = option(
        1, "epochs between evaluations of the weights and of their average; the last is always evaluated", free=True,
        at_least=1,
    )  # fmt: skip
    eval_batch_size: int = option(128, "images per forward of the evaluation on each rank", free=True, at_least=1)
    crop_pct: float | None = option(
        None, "share of the shorter side that the evaluation's center crop shows; none: 0.875 below 384 pixels, else 1",
        free=True, above=0, at_most=1,
    )  # fmt: skip
    layer_decay: float = option(
        0.65,
        "each block learns at this times the rate of the next; the head at the full rate",
        above=0,
        at_most=1,
        group="fine-tuning",
    )
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0),
        "least and largest area of the random crop, as a share of the image",
        above=0,
        at_most=1,
        group="augmentation",
    )
    augment_policy: str = option(
        "none", "RandAugment as timm does it, which must be installed; the reference's is rand-m9-mstd0.5-inc1; none: "
        "torchvision's, by the next two options",
    )  # fmt: skip
    augment_ops: int = option(
        2, "torchvision's RandAugment: operations on each image; 0: no RandAugment at all", at_least=0
    )
    augment_magnitude: int = option(9, "strength of these operations, of 30", at_least=0, at_most=30)
    erasing: float = option(0.25, "how often a rectangle of an image becomes noise", at_least=0, at_most=1)
    mixup: float = option(0.8, "mixup's alpha; 0: no mixup", at_least=0)
    cutmix: float = option(1.0, "cutmix's alpha; 0: no cutmix. With both, a batch gets either by chance", at_least=0)
    smoothing: float = option(
        0.1, "label smoothing: the share of a label that all classes divide", at_least=0, at_most=1
    )
    ema_decay: float = option(
        0.9999, "of the moving average of the weights, saved and evaluated beside them; 0: none", at_least=0, below=1
    )


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """Top-1 and top-5 of a classifier on folders of images, such as ImageNet-A, ImageNet-R and ImageNet-Sketch.

    A folder may have only some of the classifier's classes: it then chooses among these.
    """

    stage: ClassVar[str] = "evaluate"
    example: ClassVar[str] = "python train/evaluate.py --model runs/finetune --data PHOTOS/test --out runs/evaluate"
    out: Path = option(Path("runs/evaluate"), "run folder for results.json and the log")
    model: Path = option(
        Path("runs/finetune"),
        f"a fine-tuned classifier, in any format: {SOURCE}",
        holds="start",
    )
    data: tuple[Path, ...] = option(
        (Path("data/val"),), "folders of class folders, named as the training's; also tar shards"
    )
    classes: Path | None = option(
        None, "the classifier's classes in its order: a folder of class folders (the training's), or a text file with "
        "one name per line; none: those that a fine-tuning wrote into its run folder"
    )  # fmt: skip
    image_size: int | None = option(
        None, "side of the images, in pixels, to which positions are resized; none: that of the training", at_least=1
    )
    crop_pct: float | None = option(
        None, "share of the shorter side that the center crop shows; none: 0.875 below 384 pixels, else 1", above=0,
        at_most=1,
    )  # fmt: skip
    precision: str = option(
        "auto", "arithmetic; bf16, fp16: autocast; auto: bf16 on GPUs that have it and CPUs that multiply it fast, "
        "fp16 on older GPUs, else fp32", choices=("auto", *PRECISIONS),
    )  # fmt: skip
    loader: str = option("auto", "what loads the images", choices=LOADERS)
    batch_size: int = option(128, "images per forward on each rank", free=True, at_least=1)


@dataclass(frozen=True)
class SegmentConfig(StartConfig):
    """Semantic segmentation with UPerNet (arXiv 2208.06366 section 3.3)."""

    stage: ClassVar[str] = "segment"
    example: ClassVar[str] = (
        "python train/segment.py --preset demo --data SCENES --weights runs/pretrain --out runs/segment"
    )
    data: Path = option(
        Path("data"),
        "folder with FOLDER/train/images and FOLDER/train/masks (also annotations or labels), or as ADE20K has them, "
        "FOLDER/images/training and FOLDER/annotations/training, or FOLDER/images and FOLDER/masks; masks are PNG "
        "files of the images' names and sizes, gray or with a palette, whose values are the classes (see label_values)",
        holds="images",
        group="images",
    )
    out: Path = option(Path("runs/segment"), OUT)
    val: Path | None = option(
        None, "folder of images and masks to evaluate on, laid out like one of --data's; none: val, validation or test "
        "of --data", free=True, group="evaluation and classes",
    )  # fmt: skip
    num_classes: int = option(
        0, "number of classes; 0: one more than the largest label in the training's masks", at_least=0, at_most=255
    )
    ignore_labels: tuple[int, ...] = option(
        (), "labels in the masks that count for nothing, beside 255 (CamVid's void: 11)", at_least=0, at_most=255
    )
    reduce_zero_label: bool = option(
        False, "label 0 of the masks counts for nothing, and the first class is their label 1, as in ADE20K"
    )
    label_values: tuple[int, ...] = option(
        (), "the labels in the masks that are class 0, class 1, ... in this order (0 255: masks in black and white), "
        "instead of --num-classes and --reduce-zero-label; others are an error unless they count for nothing; none "
        "given: the labels are the classes", at_least=0, at_most=255,
    )  # fmt: skip
    steps: int = option(
        160_000, "training steps, whatever --epochs says; 0: --epochs says it", at_least=0, group="schedule"
    )
    warmup_steps: int = option(
        1500, "steps in which the learning rate rises from 0, whatever --warmup-epochs says; with --steps 0 that says "
        "it", at_least=0,
    )  # fmt: skip
    power: float = option(1.0, "of the schedule: the rate falls as (1 - step / steps) ^ power", above=0)
    layer_decay: float = option(
        0.75, "each block learns at this times the rate of the next; the heads at the full rate", above=0, at_most=1
    )
    layers: tuple[int, ...] = option(
        (), "the four blocks, counted from 0, that the feature pyramid reads, the last one of all among them; none "
        "given: 3 5 7 11 of 12, 7 11 15 23 of 24, evenly spread of others", at_least=0, group="network head",
    )  # fmt: skip
    channels: int = option(0, "width of UPerNet; 0: that of the vision transformer", at_least=0)
    auxiliary_channels: int = option(256, "width of the auxiliary head", at_least=1)
    auxiliary_weight: float = option(0.4, "weight of the auxiliary head's loss; 0: none", at_least=0)
    dropout: float = option(0.1, "share of channels dropped before the logits", at_least=0, below=1)
    base_size: int = option(
        0, "shorter side of an image at scale 1, in pixels, in training and evaluation; the longer side is at most "
        "four times that; 0: image_size", at_least=0, group="augmentation",
    )  # fmt: skip
    scale_range: tuple[float, float] = option(
        (0.5, 2.0), "least and largest random scale of an image, from which image_size is cut", above=0
    )
    max_class_share: float = option(
        0.75, "a crop in which one class has more than this share is drawn again, up to ten times", above=0, at_most=1
    )
    distortion: bool = option(True, "brightness, contrast, saturation and hue change at random")
    eval_every: int = option(
        10, "epochs between evaluations; the last step is always evaluated", free=True, at_least=1, group="evaluation"
    )
    eval_batch_size: int = option(8, "windows per forward of the evaluation on each rank", free=True, at_least=1)
    stride: int = option(
        0, "pixels from one window of the evaluation to the next; 0: two thirds of image_size", free=True, at_least=0
    )
    multi_scale: bool = option(
        False, "at the end, also evaluate the mean over --scales and both sides, as many forwards as that takes",
        free=True,
    )  # fmt: skip
    scales: tuple[float, ...] = option((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "of --multi-scale", free=True, above=0)
    overlays: int = option(
        6, "validation images whose truth and prediction are drawn, in overlays/ of the run folder", free=True,
        at_least=0,
    )  # fmt: skip


_BASE = SegmentConfig(
    image_size=512, batch_size=2, lr=5e-5, lr_batch=16, min_lr=0.0, warmup_epochs=0, weight_decay=0.05,
    betas=(0.9, 0.999), clip_grad=0.0, drop_path=0.15, layer_decay=0.75, num_classes=150, reduce_zero_label=True,
    log_every=50,
)  # fmt: skip

_LARGE = replace(_BASE, **SIZES["large"], lr=4e-5, drop_path=0.2, layer_decay=0.9, layer_scale=1e-5)

SEGMENT = {
    # ADE20K; batch 16 on 8 GPUs
    "base": _BASE,
    "large": _LARGE,
    # from weights that were fine-tuned on ImageNet-21k
    "base_after_intermediate": replace(_BASE, layer_decay=0.85),
    "large_after_intermediate": replace(_LARGE, lr=3e-5),
    # not in the paper: small images on a laptop
    "demo": replace(
        _BASE,
        image_size=128,
        dim=128, depth=6, heads=2, init_std=0.1, layer_scale=0.0, drop_path=0.0, num_classes=0, ignore_labels=(11,),
        reduce_zero_label=False, steps=0, epochs=20, batch_size=8, lr=1e-3, lr_batch=8, warmup_epochs=1, channels=64,
        auxiliary_channels=32, layer_decay=0.9, in_memory=True, workers=0, log_every=20,
        save_every_minutes=1.0, clip_grad=3.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerQualityConfig(RunConfig):
    """Codebook usage and reconstruction similarity of a trained tokenizer (arXiv 2208.06366 section 3.4, table 6)."""

    stage: ClassVar[str] = "tokenizer_quality"
    out: Path = option(Path("runs/tokenizer_quality"), "run folder for results.json and the log")
    run: Path = option(Path("runs/tokenizer"), f"the tokenizer: {SOURCE}", holds="start")
    data: Path = option(Path("data"), "folder of images; FOLDER/test or FOLDER/val is used if there is one")
    max_images: int = option(5000, "at most so many images, evenly spread over the list", at_least=1)
    batch_size: int = option(64, "images per forward", free=True, at_least=1)
