"""What the tests of weights share: tiny models of every kind with weights that are random in every entry."""

from __future__ import annotations

import torch
from torch import nn

from beitv2_fast import (
    Classifier,
    ClassifierConfig,
    Student,
    StudentConfig,
    Tokenizer,
    TokenizerModelConfig,
    ViTConfig,
)

DIM, DEPTH, HEADS, SIZE, PATCH = 32, 3, 4, 48, 16
POSITIONS = ("shared_relative", "relative", "absolute", "none", "absolute_shared_relative", "absolute_relative")


def vit(position: str, layer_scale: float = 0.1, eps: float = 1e-6) -> ViTConfig:
    return ViTConfig(SIZE, PATCH, 3, DIM, DEPTH, HEADS, position=position, layer_scale=layer_scale, eps=eps)


def randomize(model: nn.Module) -> nn.Module:
    """No entry stays at a value that a mistake in conversion would leave unnoticed."""
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + 0.1)
    return model.eval()


def student(position: str = "shared_relative", **values) -> Student:
    values = {"num_codes": 20, "early_layer": 2, "aggregation_depth": 2, **values}
    return randomize(Student(StudentConfig(vit(position, values.pop("layer_scale", 0.1)), **values)))


def classifier(position: str = "relative", num_classes: int = 7, layer_scale: float = 0.1, **values) -> Classifier:
    return randomize(Classifier(ClassifierConfig(vit(position, layer_scale, **values), num_classes)))


def tokenizer(**values) -> Tokenizer:
    values = {"decoder_depth": 1, "num_codes": 24, "code_dim": 8, "teacher_dim": 12, **values}
    model = randomize(Tokenizer(TokenizerModelConfig(vit("absolute", 0.0), **values)))
    model.quantize.codebook.copy_(nn.functional.normalize(model.quantize.codebook, dim=-1))
    model.quantize.initialized.fill_(True)
    model.quantize.idle.copy_(torch.arange(len(model.quantize.idle)))
    model.quantize.steps.fill_(5)
    return model


def images(count: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def randomized(theirs: nn.Module) -> nn.Module:
    """Another library's model with random parameters, in eval mode."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.1, 0.2)
    return theirs.eval()
