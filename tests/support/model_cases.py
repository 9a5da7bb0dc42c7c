"""A small model of every kind with a batch and its training loss, for tests that run all of them somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast.downstream.segmentation.model import Segmenter, SegmenterConfig
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.train.segment import SegmentTask

from .gpu import pick

GRID, PATCH = 6, pick(16, 8)
VIT = dict(image_size=GRID * PATCH, patch_size=PATCH, dim=pick(192, 48), heads=3, depth=3, init_std=0.1)
NUM_CODES, TEACHER_DIM, CLASSES, MASKED = pick(1000, 40), 24, 7, 14
Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """build: options of the ViT -> a model in training mode, the same one every time. batch: so many images, at least
    ``least``. loss: of a model on a batch."""

    build: Callable[..., nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[..., Tensor]
    least: int = 1


def _tokenizer(num_codes: int = 32, **vit: Any) -> Tokenizer:
    options = dict(decoder_depth=1, num_codes=num_codes, code_dim=32, teacher_dim=TEACHER_DIM, kmeans_init=False)
    return Tokenizer(TokenizerModelConfig(ViTConfig(**{**VIT, "position": "absolute", **vit}), **options))


def _student(aggregation_depth: int = 2, shared_head: bool = True) -> Callable[..., Student]:
    def build(**vit: Any) -> Student:
        shape = ViTConfig(**{**VIT, "layer_scale": 0.1, **vit})
        return Student(StudentConfig(shape, NUM_CODES, 2, aggregation_depth, shared_head))

    return build


def _classifier(**vit: Any) -> Classifier:
    return Classifier(
        ClassifierConfig(ViTConfig(**{**VIT, "position": "relative", "layer_scale": 0.1, **vit}), CLASSES)
    )


def _segmenter(**vit: Any) -> Segmenter:
    shape = ViTConfig(**{**VIT, "position": "relative", **vit})
    return Segmenter(SegmenterConfig(shape, CLASSES, channels=16, auxiliary_channels=8, dropout=0.0))


def _seeded(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same weights every time, bias tables that are not zero among them."""

    def seeded(**options: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(**options)
            for name, parameter in model.named_parameters():
                if name.endswith(("relative_position_bias_table", "q_bias", "v_bias")):
                    nn.init.normal_(parameter, std=0.5)
        return model.train()

    return seeded


def _drawn(count: int) -> torch.Generator:
    return torch.Generator().manual_seed(count)


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, VIT["image_size"], VIT["image_size"], generator=_drawn(count))


def _with_teacher(count: int) -> Batch:
    return _images(count), torch.randn(count, GRID * GRID, TEACHER_DIM, generator=_drawn(count))


def _masked(count: int) -> Batch:
    g = _drawn(count)
    mask = torch.rand(count, GRID * GRID, generator=g).argsort(1) < MASKED
    return _images(count), mask, torch.randint(NUM_CODES, (count * MASKED,), generator=g), MASKED


def _labeled(count: int) -> Batch:
    return _images(count), torch.randint(CLASSES, (count,), generator=_drawn(count))


def _segmented(count: int) -> Batch:
    side, g = VIT["image_size"], _drawn(count)
    labels = torch.randint(CLASSES, (count, side, side), generator=g).to(torch.uint8)
    labels[:, 0] = 255  # ignored
    return (_images(count) * 255).to(torch.uint8), labels


def _segmentation_loss(model: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
    return SegmentTask(model, 0.4).loss(model, {"image": images, "mask": mask})[0]


def _output_loss(model: nn.Module, *batch: Any) -> Tensor:
    return model(*batch).loss


def _case(build: Callable[..., nn.Module], *rest: Any) -> Case:
    return Case(_seeded(build), *rest)


CASES = {
    "tokenizer": _case(_tokenizer, _with_teacher, _output_loss),
    "student": _case(_student(), _masked, _output_loss),
    "student, separate heads": _case(_student(shared_head=False), _masked, _output_loss),
    "student, no aggregation": _case(_student(aggregation_depth=0), _masked, _output_loss),
    "classifier": _case(_classifier, _labeled, lambda model, x, labels: F.cross_entropy(model(x).float(), labels)),
    "segmenter": _case(_segmenter, _segmented, _segmentation_loss, 4),  # of fewer, batch norms magnify what was rounded
}
