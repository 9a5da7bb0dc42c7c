"""Codes that nobody chooses start again at vectors of the batch, with all of their state."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..sampling import directed, sample_rows
from .reference import fp32, l2, total_size


def find_dead(cluster_size: Tensor, idle: Tensor | None, dead_after: float, dead_below: float) -> Tensor:
    """Which codes have a size under dead_below or, with dead_after > 0, are idle for more than dead_after vectors."""
    dead = cluster_size < fp32(dead_below)
    return dead if idle is None or dead_after <= 0 else dead | (idle > dead_after)


def restart_dead_codes(
    dead: Tensor,
    x: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    idle: Tensor | None,
    *,
    metric: str,
    salt: int | Tensor,
    least_size: float = 0.0,
    process_group: dist.ProcessGroup | str | None = None,
) -> Tensor:
    """Restart the codes marked in ``dead`` [K] at vectors of all ranks' batch, in place on the state given.

    The i-th dead code takes the i-th vector drawn by the salt, without replacement and the same on every rank: ``v_j``
    is the vector (l2 of it for cosine), ``c_j`` the average cluster size (at least ``least_size``), ``embed_avg_j =
    c_j v_j``, ``idle_j = 0``. Vectors that are not finite, or zero for cosine, are never drawn; with more dead codes
    than vectors the last ones stay.

    Returns:
        which codes restarted, [K] bool.
    """
    rows, found = sample_rows(x, len(codebook), salt, directed(x) if metric == "cosine" else None, process_group)
    turn = (dead.cumsum(0) - 1).clamp(min=0)
    restart = dead & found[turn]
    fresh = (l2(rows) if metric == "cosine" else rows)[turn]
    codebook.copy_(torch.where(restart[:, None], fresh, codebook))
    # As popular as the average code: neither dead again at once, nor a weight that outlives its start.
    size = (total_size(cluster_size) / len(codebook)).clamp(min=fp32(least_size)).float()
    cluster_size.copy_(torch.where(restart, size, cluster_size))
    if embed_avg is not None:
        embed_avg.copy_(torch.where(restart[:, None], fresh * size, embed_avg))
    if idle is not None:
        idle.masked_fill_(restart, 0)
    return restart
