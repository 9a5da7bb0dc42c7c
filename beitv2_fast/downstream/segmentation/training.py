"""Where a segmentation's training starts, what a step of it does, its schedule, and its validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...config.downstream import SegmentConfig
from ...data.images import ImageList
from ...distributed import World, autocast_dtype
from ...errors import UserError, first_few
from ...models.vit import ViTConfig
from ...runs.checkpoints import latest_weights, load_model, read_weights
from ...runs.folder import RunFolder, read_config, stored_config
from ...runs.logs import is_best
from ...training.images import checked_images
from ...weights.build import same_options, trained_vit, vit_config
from ...weights.files import read
from ...weights.shapes import describe_backbone
from ...weights.start import SHAPE, check_shape, describe_new, start_config, start_from
from .evaluation import Slide, evaluate_segmenter
from .masks import MaskList, find_masks, label_table, training_folders
from .model import Segmenter, SegmenterConfig
from .overlays import write_overlays
from .views import SegmentationFolder, TrainView

LAST_LAYER = "decode_head.conv_seg.weight"


def segmenter_config(config: SegmentConfig, vit: ViTConfig, num_classes: int) -> SegmenterConfig:
    try:
        return SegmenterConfig(**{**same_options(config, SegmenterConfig), "vit": vit, "num_classes": num_classes})
    except ValueError as error:
        raise UserError(f"{error}. Change --layers or --depth.") from error


def start_segmenter(config: SegmentConfig, num_classes: int, say: Callable[[str], None]) -> Segmenter:
    """A segmenter with the backbone that the config names, at its image size and drop path, with new heads.

    The weights are a student's, a tokenizer's (its encoder), a classifier's, in any format, or another segmentation's
    or a published segmenter's, whose heads are kept but for the last layers if the classes are of another number.

    Raises:
        UserError: the weights are of another shape than the options say; CheckpointError: they cannot be read.
    """
    if config.from_scratch:
        say("random weights")
        return Segmenter(segmenter_config(config, vit_config(config, position="relative"), num_classes))
    assert config.weights is not None
    if is_segmentation(config.weights):
        stored, backbone, state = _read_segmentation(config.weights)
        check_shape(config, stored, (*SHAPE, "channels", "auxiliary_channels"))
    else:
        loaded = read(config.weights)
        backbone, state = loaded.backbone(heads=config.heads), loaded.ours
    model = Segmenter(segmenter_config(config, start_config(config, backbone), num_classes))
    new = start_from(model, state, str(config.weights))
    say(f"weights from {config.weights}; {describe_new(new)}")
    return model


def is_segmentation(path: Path) -> bool:
    """Whether it is the run folder of a segmentation."""
    return (path / "config.json").is_file() and stored_config(path)["stage"] == SegmentConfig.stage


def load_segmenter(run: Path) -> tuple[Segmenter, SegmentConfig]:
    """The model of a segmentation's run folder, from its newest checkpoint, in eval mode."""
    if not is_segmentation(run):
        raise UserError(f"{run} is no run folder of a segmentation. Name one that train/segment.py wrote.")
    config, backbone, state = _read_segmentation(run)
    num_classes = len(state[LAST_LAYER])
    model = Segmenter(segmenter_config(config, trained_vit(config, backbone), num_classes))
    load_model(model, state, str(latest_weights(run)))
    return model.eval(), config


def published_segmenter(config: SegmentConfig) -> Segmenter:
    """The segmenter in the file of --weights, whole, in eval mode, at the config's image size."""
    assert config.weights is not None
    loaded = read(config.weights)
    state = loaded.ours
    if LAST_LAYER not in state:
        raise UserError(f"--evaluate: {config.out} has no checkpoint yet, and {config.weights} is no segmenter.")
    classes = config.num_classes or len(state[LAST_LAYER])
    vit = start_config(config, loaded.backbone(heads=config.heads))
    model = Segmenter(segmenter_config(config, vit, classes))
    if new := start_from(model, state, str(config.weights)):
        raise UserError(f"{config.weights} is no whole segmenter of {classes} classes: it lacks {first_few(new)}.")
    return model.eval()


def _read_segmentation(run: Path) -> tuple[SegmentConfig, ViTConfig, dict[str, Tensor]]:
    config, state = read_config(SegmentConfig, run), read_weights(latest_weights(run))
    return config, describe_backbone(state, {"heads": config.heads}), state


def checked_pairs(
    folders: tuple[Path, Path], config: SegmentConfig, run: RunFolder, world: World, name: str = ""
) -> tuple[ImageList, MaskList]:
    """The images and masks of two folders, checked once: the images by all ranks, the masks by rank 0."""
    images = checked_images(folders[0], None, config, run, world, min_size=1, name=name)

    def masks() -> MaskList:
        return find_masks(images, folders[1].resolve(), run.path / f"masks{name}.json", config.workers)

    return images, world.from_rank_0(masks)


def training_folder(config: SegmentConfig, run: RunFolder, world: World) -> tuple[SegmentationFolder, int]:
    """The training's images and masks, and the number of classes."""
    if len(set(config.label_values)) < len(config.label_values):
        raise UserError(f"--label-values {config.label_values} names a label twice; each is one class.")
    if config.loader in ("dali", "gpu"):
        raise UserError(f"--loader {config.loader}: images and masks are cut by torchvision. Leave it out.")
    images, masks = checked_pairs(training_folders(config.data), config, run, world)
    table = label_table(config.ignore_labels, config.reduce_zero_label, config.label_values)
    masks.check_foreground(table)
    num_classes = len(config.label_values) or config.num_classes or masks.largest_label(table) + 1
    if num_classes < 2:
        raise UserError(f"the masks in {masks.root} have labels of {num_classes} classes that count; 2 are needed.")
    masks.check_range(table, num_classes)
    if doubt := masks.doubt(table, num_classes):
        run.print(f"warning: {doubt}")
    view = TrainView(
        config.image_size, config.base_size or config.image_size, config.scale_range, config.max_class_share,
        config.distortion,
    )  # fmt: skip
    folder = SegmentationFolder(images, masks, table, view, config.seed, in_memory=config.in_memory)
    run.print(f"images: {len(images):,} from {images.root}, masks of {num_classes} classes from {masks.root}")
    return folder, num_classes


class SegmenterValidation:
    """Evaluates at the ends of epochs: a line in the log, evaluation.jsonl, results.json, and overlays in the end."""

    def __init__(
        self,
        config: SegmentConfig,
        folders: tuple[Path, Path],
        num_classes: int,
        run: RunFolder,
        world: World,
        last_step: int | None = None,
    ):
        """last_step: the one after which --multi-scale evaluates; None: after any."""
        self.config, self.num_classes, self.run, self.world = config, num_classes, run, world
        self.last_step = last_step
        self.best: str | None = None  # "weights", if those just evaluated have the highest mIoU so far
        images, masks = checked_pairs(folders, config, run, world, "_val")
        table = label_table(config.ignore_labels, config.reduce_zero_label, config.label_values)
        masks.check_range(table, num_classes)
        if doubt := masks.doubt(table, num_classes):
            run.print(f"warning: {doubt}")
        self.folder = SegmentationFolder(images, masks, table)
        stride = config.stride or max(config.image_size * 2 // 3, 1)
        self.slide = Slide(
            config.image_size, stride, config.base_size or config.image_size, batch=config.eval_batch_size
        )

    def __call__(self, step: int, models: dict[str, nn.Module], progress: Callable[[], None]) -> None:
        model = models["weights"]
        results: dict[str, dict[str, Any]] = {}
        slides = {"weights": self.slide}
        if self.config.multi_scale and self.last_step in (None, step):
            slides["multi_scale"] = dataclasses.replace(self.slide, scales=self.config.scales, flip=True)
        drawn = self._drawn()
        for name, slide in slides.items():
            scores = evaluate_segmenter(
                model, self.folder, self.num_classes, slide, self.world, workers=self.config.workers,
                amp=autocast_dtype(self.config.precision, self.world.device), keep=drawn, progress=progress,
            )  # fmt: skip
            numbers = scores.numbers()
            self.run.print(f"evaluation  step {step}  {name:<11} {miou_line(numbers)}")
            results[name] = {**numbers, "iou": [None if x != x else x for x in scores.iou().tolist()]}
            self.run.metrics(step, {f"{name}_{key}": v for key, v in numbers.items()}, "evaluation.jsonl")
        better = self.world.first(int(is_best(self.run.path, step, results["weights"]["miou"], "weights_miou")))
        self.best = "weights" if better else None
        self.run.results({"step": step, "classes": self.num_classes, **results})
        if self.run.writes:
            write_overlays(self.run, step, self.folder, scores.predictions)

    def _drawn(self) -> list[int]:
        """Images spread evenly over rank 0's."""
        own = list(range(0, len(self.folder), self.world.size))
        count = min(self.config.overlays, len(own))
        return [own[i * len(own) // count] for i in range(count)]


def miou_line(numbers: dict[str, float]) -> str:
    return (
        f"mIoU {numbers['miou']:.2%}  mAcc {numbers['macc']:.2%}  aAcc {numbers['aacc']:.2%}  "
        f"{numbers['images']:,} images"
    )
