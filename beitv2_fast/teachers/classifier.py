"""A teacher with a head for classes: the teacher's own row beside those of the models that learned from it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.vit import IMAGENET_MEAN, IMAGENET_STD
from .base import Teacher

TEACHER = "teacher:"  # before a teacher's name where a command else reads weights
NOT_DECAYED = re.compile(r"(?<![a-z])(pos|position|positional|cls|class)_")  # in names of positions and tokens


def teacher_name(source: Path | str | None) -> str | None:
    """NAME of "teacher:NAME"; None of anything else."""
    return str(source).removeprefix(TEACHER) if str(source).startswith(TEACHER) else None


class TeacherClassifier(nn.Module):
    """Images [B, 3, S, S], normalized with ImageNet's statistics as for a ``Classifier`` -> logits [B, num_classes]:
    the mean of the teacher's patch features, LayerNorm, linear.

    The network stays in eval mode, so that nothing is dropped and no statistics of batches move. What its features do
    not depend on stays frozen. Layers, for layer-wise learning rates, are the blocks of its largest list of modules.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, teacher: Teacher, image_size: int, num_classes: int):
        super().__init__()
        self.image_size, self.patch_size = image_size, teacher.patch_size
        self.grid = (image_size // teacher.patch_size,) * 2
        self.teacher = teacher.requires_grad_(True)
        self.fc_norm = nn.LayerNorm(teacher.dim, 1e-6)
        self.head = nn.Linear(teacher.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        chain, self.blocks = self._find_blocks()
        self._layers = self._find_layers(chain)

    def train(self, mode: bool = True) -> TeacherClassifier:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        features = self.teacher.patches(images * self.std + self.mean, self.grid)
        return self.head(self.fc_norm(features.mean(1)))

    def no_weight_decay(self) -> set[str]:
        """Tokens and positions, as a ViT's here."""
        return {name for name, _ in self.named_parameters() if NOT_DECAYED.search(name)}

    def layer_of(self, name: str) -> int:
        """As a ViT's: what comes before the blocks 0, block i is i + 1, what comes after them n + 1."""
        return self._layers[name]

    def _find_blocks(self) -> tuple[str, range]:
        """The name of the list of modules with the most parameters, and the numbers of those modules."""
        lists = {n: m for n, m in self.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
        most = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default="")
        return f"{most}.", range(len(lists.get(most, ())))

    def _find_layers(self, chain: str) -> dict[str, int]:
        """By the order in which backward reaches the parameters of the network; those that it does not are frozen."""
        reached: list[str] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.append(name))
            for name, parameter in self.named_parameters()
        ]
        self.eval()
        with torch.enable_grad():
            self(self.mean.expand(1, -1, self.image_size, self.image_size)).sum().backward()
        for hook in hooks:
            hook.remove()
        layers, layer_outside = {}, len(self.blocks) + 1
        for name in reached:
            if name.startswith(chain):
                layer_outside = 0
                layers[name] = int(name.removeprefix(chain).split(".")[0]) + 1
            else:
                layers[name] = layer_outside
        for name, parameter in self.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in layers)
        return layers
