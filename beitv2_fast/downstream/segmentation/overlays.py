"""Pictures of a segmentation: image | truth | prediction, each class in a color of its own over the photograph."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...pictures import class_colors
from ...runs.folder import RunFolder
from .masks import IGNORED
from .views import SegmentationFolder

GAP = 6  # white pixels between the three


def overlay(image: Tensor, labels: Tensor, strength: float = 0.65) -> Tensor:
    """uint8 [3, H, W] and uint8 [H, W] -> uint8 [3, H, W]; what counts for nothing stays a photograph, darkened."""
    colors = torch.cat([class_colors(IGNORED), torch.zeros(1, 3, dtype=torch.uint8)]).to(image.device)
    painted = colors[labels.long()].movedim(-1, 0).float()
    return ((1 - strength) * image.float() + strength * painted).round().to(torch.uint8)


def picture(image: Tensor, truth: Tensor, prediction: Tensor) -> Tensor:
    """image | truth | prediction, uint8 [3, H, 3 W + 2 gaps]. Where the truth is ignored, so is the prediction."""
    shown = torch.where(truth == IGNORED, truth, prediction)
    gap = image.new_full((3, image.shape[1], GAP), 255)
    return torch.cat([image, gap, overlay(image, truth), gap, overlay(image, shown)], 2)


def write_overlays(run: RunFolder, step: int, folder: SegmentationFolder, predictions: dict[int, Tensor]) -> None:
    """overlays/NAME.png in the run folder, and the first one for TensorBoard."""
    target = run.path / "overlays"
    for i, (index, prediction) in enumerate(sorted(predictions.items())):
        batch = folder.__getitems__([(0, index)])
        made = picture(batch["image"][0], batch["mask"][0], prediction)
        target.mkdir(exist_ok=True)
        name = Path(folder.images.paths[index]).with_suffix(".png").as_posix().replace("/", "_")
        Image.fromarray(made.permute(1, 2, 0).contiguous().numpy()).save(target / name)
        if i == 0:
            run.image("overlay", made.float() / 255, step)
