"""The options of a FusedVectorQuantizer, which explains them, and which of them make sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch.distributed as dist
from torch import nn

from ..kernels.checks import METRICS

if TYPE_CHECKING:
    from .quantizer import FusedVectorQuantizer

LEARNING = ("code_ema", "sum_ema", "gradient", "frozen")
GRADIENT = ("straight_through", "rotation", "codes")
DEAD_AFTER = 50.0  # the default, chosen by `python -m bench.collapse`: 25 to 100 fill a codebook, 200 takes long


class QuantizerOptions(TypedDict, total=False):
    """For configs, and for functions that hand options on: ``**options: Unpack[QuantizerOptions]``."""

    metric: str
    learning: str | None
    transform: nn.Module | None
    stored_dim: int | None
    decay: float
    eps: float
    commitment_weight: float
    codebook_weight: float
    gradient: str
    temperature: float
    heads: int
    share_codebook: bool
    channel_last: bool
    kmeans_init: bool
    kmeans_iterations: int
    dead_after: float
    dead_below: float
    restart_below: float
    restart_after: int
    track_eval_usage: bool
    sync: bool | str | dist.ProcessGroup
    seed: int


def check_options(quantizer: FusedVectorQuantizer) -> None:
    """Raise ValueError for options that make no sense, saying which."""
    q = quantizer
    if q.num_codes < 1 or q.dim < 1:
        raise ValueError(f"num_codes and dim must be positive; got {q.num_codes} and {q.dim}")
    if q.heads < 1 or q.dim % q.heads:
        raise ValueError(f"dim must be a multiple of heads; got dim={q.dim}, heads={q.heads}")
    for name, allowed in (("metric", METRICS), ("learning", LEARNING), ("gradient", GRADIENT)):
        if getattr(q, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(q, name)!r}")
    if q.learning == "code_ema" and q.metric != "cosine":
        raise ValueError("learning='code_ema' averages unit vectors: take metric='cosine' or learning='sum_ema'")
    if q.transform is not None and q.learning not in ("frozen", "gradient"):
        raise ValueError(f"learning={q.learning!r} moves codes to vectors, which transform would move away again")
    if q.stored_dim is not None and (q.transform is None or q.stored_dim < 1):
        raise ValueError(f"stored_dim, the width of the codes that a transform reads, makes no sense: {q.stored_dim}")
    for names, low, high in (
        ("decay restart_below", 0, 1),
        ("commitment_weight codebook_weight temperature dead_after dead_below eps", 0, float("inf")),
        ("kmeans_iterations restart_after", 1, float("inf")),
    ):
        for name in names.split():
            if not low <= getattr(q, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}]; got {getattr(q, name)}")
    if q.dead_below and q.learning not in ("sum_ema", "gradient"):
        raise ValueError(
            f"dead_below compares cluster sizes, which learning={q.learning!r} only reports and may reset: "
            "take dead_after, learning='sum_ema' or 'gradient'"
        )
