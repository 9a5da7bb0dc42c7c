"""A head with its tokens, masks and labels, for the tests of masked_cross_entropy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from beitv2_fast.kernels import masked_cross_entropy
from beitv2_fast.kernels.masked_cross_entropy.reference import masked_cross_entropy_reference


@dataclass
class Problem:
    """branches are slices of ``tokens``, the leaves; every float tensor requires a gradient."""

    tokens: list[Tensor]
    mask: Tensor
    labels: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor | None
    num_masked: int | None = None

    @property
    def leaves(self) -> list[Tensor]:
        parameters = [self.norm_weight, self.norm_bias, self.weight, self.bias]
        return [*self.tokens, *(p for p in parameters if p is not None)]

    @property
    def branches(self) -> list[Tensor]:
        return [t[:, 1:] for t in self.tokens]

    def ours(self) -> tuple[Tensor, Tensor]:
        return masked_cross_entropy(
            self.branches,
            self.mask,
            self.labels,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            weight=self.weight,
            bias=self.bias,
            num_masked=self.num_masked,
        )

    def reference(self) -> tuple[Tensor, Tensor]:
        return masked_cross_entropy_reference(
            self.branches,
            self.mask,
            self.labels,
            self.norm_weight,
            self.norm_bias,
            self.weight,
            self.bias,
            1e-6,
            self.num_masked,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(value):
            if isinstance(value, list):
                return [cast(v) for v in value]
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype).requires_grad_()
            return value

        return replace(self, **{f.name: cast(getattr(self, f.name)) for f in fields(self)})


def problem(
    images: int = 3,
    patches: int = 11,
    num_masked: int | None = 4,
    dim: int = 24,
    classes: int = 83,
    branches: int = 2,
    *,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """num_masked None: a ragged mask."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    chance = torch.rand(images, patches, generator=g)
    mask = chance < 0.4 if num_masked is None else chance.argsort(1) < num_masked
    return Problem(
        tokens=[leaf(images, 1 + patches, dim) for _ in range(branches)],
        mask=mask,
        labels=torch.randint(classes, (int(mask.sum()),), generator=g),
        norm_weight=leaf(dim),
        norm_bias=leaf(dim),
        weight=leaf(classes, dim),
        bias=leaf(classes) if bias else None,
        num_masked=num_masked,
    )
