"""Segmenting whole images of any size by a window that slides over them, and how right that is (mIoU, mAcc, aAcc)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.draws import rank_share
from ...data.loaders import keyed_loader
from ...distributed import World
from ...errors import require
from ...models.vit import normalize
from .head import resize
from .masks import IGNORED
from .views import SegmentationFolder, scaled_size


@dataclass(frozen=True)
class Slide:
    """How an image is segmented.

    Attributes:
        window: side of what the model reads. stride: from one window to the next. base_size: the image's shorter side
            at scale 1. scales, flip: of which the mean of the probabilities is taken. batch: windows per forward.
    """

    window: int
    stride: int
    base_size: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch: int = 8

    def forwards(self, size: tuple[int, int]) -> int:
        """Forwards of the model that an image (height, width) takes."""
        windows = (len(_corners(scaled_size(size, self.base_size, s), self)) for s in self.scales)
        return sum(math.ceil(n / self.batch) for n in windows) * (1 + self.flip)

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Image uint8 [3, H, W] -> probabilities [classes, H, W], the mean over scales and sides."""
        size, total = (image.shape[1], image.shape[2]), image.new_zeros((), dtype=torch.float32)
        picture = image[None].float() / 255
        for scale in self.scales:
            scaled = scaled_size(size, self.base_size, scale)
            x = picture
            if scaled != size:
                x = F.interpolate(picture, scaled, mode="bilinear", antialias=True)
            x = normalize(x)[0]
            for flipped in (False, True)[: 1 + self.flip]:
                logits = sliding_logits(model, x.flip(-1) if flipped else x, self)
                logits = logits.flip(-1) if flipped else logits
                total = total + resize(logits[None], size)[0].softmax(0)
        return total / (len(self.scales) * (1 + self.flip))


def sliding_logits(model: nn.Module, image: Tensor, slide: Slide) -> Tensor:
    """Image [3, H, W], normalized, of any size -> logits [classes, H, W], their mean where windows overlap.

    ``model`` returns a tuple with the windows' logits, at any size, first. The last window of a row or column ends at
    the image's edge. A side shorter than the window is filled up with zeros,
    the mean color, whose logits are left out.
    """
    height, width = image.shape[1:]
    missing = [max(slide.window - side, 0) for side in (width, height)]
    padded = F.pad(image, (0, missing[0], 0, missing[1]))
    sums: Tensor | None = None
    counts = image.new_zeros(padded.shape[1:])
    corners = _corners((height, width), slide)
    for first in range(0, len(corners), slide.batch):
        some = corners[first : first + slide.batch]
        windows = torch.stack([padded[:, y : y + slide.window, x : x + slide.window] for y, x in some])
        logits = resize(model(windows)[0].float(), windows.shape[2:])
        if sums is None:
            sums = logits.new_zeros(logits.shape[1], *padded.shape[1:])
        for (y, x), found in zip(some, logits, strict=True):
            sums[:, y : y + slide.window, x : x + slide.window] += found
            counts[y : y + slide.window, x : x + slide.window] += 1
    assert sums is not None
    return (sums / counts)[:, :height, :width]


def _corners(size: Sequence[int], slide: Slide) -> list[tuple[int, int]]:
    """Top and left of every window."""
    places = []
    for side in size:
        last = max(side - slide.window, 0)
        places.append([min(i * slide.stride, last) for i in range(math.ceil(last / slide.stride) + 1)])
    return [(y, x) for y in places[0] for x in places[1]]


@dataclass
class Scores:
    """A confusion matrix int64 [classes, classes], truth by rows, and what follows from it.

    IoU of a class: right / (truth + prediction - right) pixels; its accuracy: right / truth. mIoU and mAcc are the
    means over the classes for which that is defined; aAcc is the share of right pixels.
    """

    confusion: Tensor
    images: int
    predictions: dict[int, Tensor] = field(default_factory=dict)  # by image, uint8 [H, W], as far as asked for

    def numbers(self) -> dict[str, float]:
        truth, right = self.confusion.sum(1).double(), self.confusion.diag().double()
        return {
            "miou": self.iou().nanmean().item(),
            "macc": (right / truth).nanmean().item(),
            "aacc": (right.sum() / truth.sum()).item(),
            "images": self.images,
        }

    def iou(self) -> Tensor:
        """float64 [classes]; NaN for a class that is nowhere, in truth or prediction."""
        right = self.confusion.diag().double()
        return right / (self.confusion.sum(0) + self.confusion.sum(1) - right)


@torch.no_grad()
def evaluate_segmenter(
    model: nn.Module,
    folder: SegmentationFolder,
    num_classes: int,
    slide: Slide,
    world: World,
    *,
    workers: int = 0,
    amp: torch.dtype | None = None,
    keep: Collection[int] = (),
    progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Segment every image at its own size and compare with its mask.

    The images are divided among the ranks, each of which runs as many forwards (a network whose weights are spread over
    them needs all in every forward). The model is in eval mode meanwhile.

    Args:
        model: normalized images [B, 3, window, window] -> (logits [B, classes, h, w], ...).
        folder: without a view. amp: dtype of autocast. progress: called after every image.
        keep: the indices whose predictions this rank returns, if they are among its images (of rank 0 always).
    """
    metrics = require("torchmetrics.functional.classification", "segment", "Evaluating a segmentation")
    own = rank_share(len(folder), world.rank, world.size)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=world.device)
    scores = Scores(confusion, len(folder))
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
            for batch in keyed_loader(cast(Any, folder), own, 1, workers):  # read like any images
                index = int(batch["index"][0])
                found = slide(model, batch["image"][0].to(world.device)).argmax(0)
                truth = batch["mask"][0].to(world.device, torch.int64)
                confusion += metrics.multiclass_confusion_matrix(
                    found, truth, num_classes, ignore_index=IGNORED, validate_args=False
                )
                if index in keep:
                    scores.predictions[index] = found.to("cpu", torch.uint8)
                progress()
            for _ in range(_idle_forwards(folder, slide, world)):
                model(torch.zeros(1, 3, slide.window, slide.window, device=world.device))
    finally:
        model.train(was_training)
    scores.confusion = world.sum(confusion).cpu()
    return scores


def _idle_forwards(folder: SegmentationFolder, slide: Slide, world: World) -> int:
    """How many forwards the busiest rank runs more than this one."""
    if world.size == 1:
        return 0
    counts = [
        sum(slide.forwards(folder.masks.sizes[index][::-1]) for _, index in rank_share(len(folder), rank, world.size))
        for rank in range(world.size)
    ]
    return max(counts) - counts[world.rank]
