"""Features of images from any of the models, and images from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .classifier import Classifier
from .student import Student
from .tokenizer import Tokenizer


class Features(NamedTuple):
    """cls [B, C]: of the whole image. patches [B, N, C]: of each patch, row by row."""

    cls: Tensor
    patches: Tensor


def read_images(paths: Sequence[str | Path], size: int, crop_pct: float = 1.0) -> Tensor:
    """Image files -> [B, 3, size, size] in [0, 1]: the central square (``crop_pct`` of it), resized bicubically."""
    from .images import open_image
    from .transforms import EvalView

    view = EvalView(size, crop_pct)
    return torch.stack([view(open_image(path))["image"] for path in paths])


@torch.no_grad()
def features(model: Student | Classifier | Tokenizer, images: Tensor) -> Features:
    """What a model sees in images [B, 3, H, W] in [0, 1]; it normalises them as the model expects.

    A student's: CLS of the aggregation branch (the last layer's without one) and patches of the last layer, each after
    the final norm (arXiv 2208.06366 section 3.3 probes the former). A classifier's: CLS of its last layer as it is, and
    its patches, whose mean it classifies. A tokenizer's: CLS of its encoder's last layer, and its encoder's normalised
    patches.
    """
    if isinstance(model, Tokenizer):
        tokens = model.encoder.forward_tokens(2 * images - 1)
        return Features(tokens[:, 0], model.encoder.fc_norm(tokens[:, 1:]))
    from .transforms import normalise

    if isinstance(model, Classifier):
        tokens = model.forward_tokens(normalise(images))
        return Features(tokens[:, 0], tokens[:, 1:])
    last, aggregated = model.encode(normalise(images))
    norm, _ = model.aggregation_head
    return Features(norm((last if aggregated is None else aggregated)[:, 0]), model.norm(last[:, 1:]))


@torch.no_grad()
def classify(model: Classifier, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> probabilities [B, classes]."""
    from .transforms import normalise

    return model(normalise(images)).softmax(-1)
