"""States of codebooks and batches of vectors that the tests of codebook_update share."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast.kernels import codebook_update

METRICS = ["cosine", "euclidean"]


@dataclass
class State:
    codebook: Tensor
    cluster_size: Tensor
    embed_avg: Tensor | None
    idle: Tensor | None

    def clone(self) -> State:
        values = (getattr(self, field.name) for field in fields(self))
        return State(*(None if value is None else value.clone() for value in values))

    def same_bits(self, other: State) -> bool:
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def make_state(num_codes: int, dim: int, *, average: bool = False, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    codebook = F.normalize(torch.randn(num_codes, dim, generator=generator), dim=-1)
    cluster_size = 3 * torch.rand(num_codes, generator=generator)
    embed_avg = codebook * cluster_size[:, None] if average else None
    return State(codebook, cluster_size, embed_avg, torch.randint(0, 99, (num_codes,), generator=generator))


def make_batch(count: int, num_codes: int, dim: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Vectors over many orders of magnitude; codes of which the first is popular and the last one never chosen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator) * torch.randn(count, 1, generator=generator).exp().pow(3)
    spread = torch.rand(count, generator=generator).square() * max(1, num_codes - 1)
    return x, spread.long().clamp(max=num_codes - 1)


def update(state: State, x: Tensor, indices: Tensor, **options) -> Tensor:
    return codebook_update(
        state.codebook, state.cluster_size, x, indices, embed_avg=state.embed_avg, idle=state.idle, **options
    )
