"""Options and presets of the semantic segmentation: those of the reference for ADE20K, and small ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import OUT, TrainConfig, option
from ..vit import SIZES


@dataclass(frozen=True)
class SegmentConfig(TrainConfig):
    """Semantic segmentation with UPerNet (arXiv 2208.06366 section 3.3)."""

    data: Path = option(
        Path("data"),
        "folder with FOLDER/train/images and FOLDER/train/masks (also annotations or labels), or as ADE20K has them, "
        "FOLDER/images/training and FOLDER/annotations/training, or FOLDER/images and FOLDER/masks; masks are PNG "
        "files of the images' names and sizes, grey or with a palette, whose values are the classes (see label_values)",
        holds="images",
    )
    out: Path = option(Path("runs/segment"), OUT)
    weights: Path | None = option(
        Path("runs/pretrain"),
        "where the training starts: the run folder of a pre-training, of a tokenizer (its encoder), of a fine-tuning "
        "or of another segmentation, or a file of weights in any format of `beitv2-fast convert`; none: random weights",
        holds="start",
    )
    val: Path | None = option(
        None, "folder of images and masks to evaluate on, laid out like one of --data's; none: val, validation or test "
        "of --data", free=True,
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
    steps: int = option(160_000, "training steps, whatever --epochs says; 0: --epochs says it", at_least=0)
    warmup_steps: int = option(
        1500, "steps in which the learning rate rises from 0, whatever --warmup-epochs says; with --steps 0 that says "
        "it", at_least=0,
    )  # fmt: skip
    power: float = option(1.0, "of the schedule: the rate falls as (1 - step / steps) ^ power", above=0)
    layer_decay: float = option(
        0.75, "each block learns at this times the rate of the next; the heads at the full rate", above=0, at_most=1
    )
    layer_scale: float = option(
        0.1, "initial scale of every residual branch, without --weights; 0: no layer scale", at_least=0
    )
    layers: tuple[int, ...] = option(
        (), "the four blocks, counted from 0, that the feature pyramid reads, the last one of all among them; none "
        "given: 3 5 7 11 of 12, 7 11 15 23 of 24, evenly spread of others", at_least=0,
    )  # fmt: skip
    channels: int = option(0, "width of UPerNet; 0: that of the vision transformer", at_least=0)
    auxiliary_channels: int = option(256, "width of the auxiliary head", at_least=1)
    auxiliary_weight: float = option(0.4, "weight of the auxiliary head's loss; 0: none", at_least=0)
    dropout: float = option(0.1, "share of channels dropped before the logits", at_least=0, below=1)
    base_size: int = option(
        0, "shorter side of an image at scale 1, in pixels, in training and evaluation; the longer side is at most "
        "four times that; 0: image_size", at_least=0,
    )  # fmt: skip
    scale_range: tuple[float, float] = option(
        (0.5, 2.0), "least and largest random scale of an image, from which image_size is cut", above=0
    )
    max_class_share: float = option(
        0.75, "a crop in which one class has more than this share is drawn again, up to ten times", above=0, at_most=1
    )
    distortion: bool = option(True, "brightness, contrast, saturation and hue change at random")
    eval_every: int = option(10, "epochs between evaluations; the last step is always evaluated", free=True, at_least=1)
    eval_batch_size: int = option(8, "windows a forward of the evaluation on each rank", free=True, at_least=1)
    stride: int = option(
        0, "pixels from one window of the evaluation to the next; 0: two thirds of image_size", free=True, at_least=0
    )
    evaluate: bool = option(False, "no training: evaluate the newest checkpoint of --out", free=True)
    multi_scale: bool = option(
        False, "at the end, also evaluate the mean over --scales and both sides, as many forwards as that takes",
        free=True,
    )  # fmt: skip
    scales: tuple[float, ...] = option((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "of --multi-scale", free=True, above=0)
    overlays: int = option(
        6, "validation images whose truth and prediction are drawn, in overlays/ of the run folder", free=True,
        at_least=0,
    )  # fmt: skip

    @property
    def from_scratch(self) -> bool:
        return self.weights is None or str(self.weights) == "none"


_BASE = SegmentConfig(
    image_size=512, batch_size=2, lr=5e-5, lr_batch=16, min_lr=0.0, warmup_epochs=0, weight_decay=0.05,
    betas=(0.9, 0.999), clip_grad=0.0, drop_path=0.15, layer_decay=0.75, num_classes=150, reduce_zero_label=True,
    save_every=2000, log_every=50,
)  # fmt: skip

SEGMENT = {
    # ADE20K; batch 16 on 8 GPUs
    "base": _BASE,
    "large": replace(_BASE, **SIZES["large"], lr=4e-5, drop_path=0.2, layer_decay=0.9, layer_scale=1e-5),
    # not in the paper: small images on a laptop
    "demo": replace(
        _BASE,
        data=Path("data/camvid"), out=Path("runs/demo/segment"), weights=Path("runs/demo/pretrain"), image_size=128,
        dim=128, depth=6, heads=2, init_std=0.1, layer_scale=0.0, drop_path=0.0, num_classes=0, ignore_labels=(11,),
        reduce_zero_label=False, steps=0, epochs=20, batch_size=8, lr=1e-3, lr_batch=8, warmup_epochs=1, channels=64,
        auxiliary_channels=32, layer_decay=0.9, in_memory=True, workers=0, log_every=20, save_every=200, clip_grad=3.0,
    ),
}  # fmt: skip
