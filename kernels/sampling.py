"""Random rows of a batch that is spread over ranks: the same bits on every rank, and the host never waits for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .counter_random import as_uniform, random_bits, wrapped

ALONE = ""  # in the place of a process group's name: this rank by itself


def named_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The process group of this name: custom ops take names, and a module that holds one can be copied."""
    if not isinstance(group, str):
        return group
    c10d: Any = dist.distributed_c10d
    named: dist.ProcessGroup = c10d._resolve_process_group(group)
    return named


def world(group: dist.ProcessGroup | str | None = None) -> tuple[int, int]:
    """(rank, ranks) of the process group, by default the default one; (0, 1) without one."""
    if group != ALONE and dist.is_available() and dist.is_initialized():
        group = named_group(group)
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def salt(*numbers: int | Tensor) -> int | Tensor:
    """One int64 from several, such that neighbors do not collide; a tensor if one of them is, with the same bits."""
    value: int | Tensor = 0
    for number in numbers:
        value = wrapped(wrapped(value * 6364136223846793005) + number + 1442695040888963407)
    return value ^ -(2**63)


def directed(x: Tensor) -> Tensor:
    """Which rows have a direction, [N]: a zero vector cannot become a code of unit length."""
    return (x != 0).any(-1)


def sample_rows(
    x: Tensor,
    wanted: int,
    salt: int | Tensor,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw rows without replacement from the batch of all ranks.

    Rows that hold NaN or Inf and rows of weight 0 are never drawn. Ranks may hold different numbers of rows, also none.
    A row's chance depends on its number in the whole batch, not on the rank that holds it.

    Args:
        x: [n, D], this rank's rows. wanted: how many. salt: another salt draws other rows.
        weights: [n], chances in proportion to them; by default all are equal.
        group: the ranks; by default those of the default process group, if any.

    Returns:
        (rows [wanted, D] fp32, found [wanted] bool); where the batch has too few rows, found is False at the end.
    """
    rank, ranks = world(group)
    n, numbers = len(x), row_numbers(x, group)
    group = named_group(group) if ranks > 1 else None
    # Exponential races: the row with the largest weight / Exp(1) wins with probability proportional to its weight.
    keys = 1 / -torch.log1p(-as_uniform(random_bits(salt, numbers))).clamp(max=-1e-300)
    if weights is not None:
        keys = keys * weights
    keys = torch.where(x.isfinite().all(-1) & (keys > 0), keys, -1.0)  # NaN weights compare False
    best, row = keys.topk(min(wanted, n))
    best = torch.nn.functional.pad(best, (0, wanted - len(best)), value=-1.0)
    row = torch.nn.functional.pad(row, (0, wanted - len(row)))
    if ranks == 1:
        found = best > 0
        return _take(x, row, found), found
    everyones = torch.empty(ranks * wanted, dtype=best.dtype, device=x.device)
    dist.all_gather_into_tensor(everyones, best, group=group)
    best, place = everyones.topk(wanted)
    found = best > 0
    rows = _take(x, row[place % wanted], found & (place // wanted == rank))
    dist.all_reduce(rows, group=group)  # every row is zero on all ranks but one: the sum is exact
    return rows, found


def row_numbers(x: Tensor, group: dist.ProcessGroup | str | None = None) -> Tensor:
    """The numbers [n] of this rank's rows x [n, D] in the batch of all ranks."""
    rank, ranks = world(group)
    numbers = torch.arange(x.shape[0], device=x.device)
    if ranks > 1:
        counts = torch.empty(ranks, dtype=torch.int64, device=x.device)
        dist.all_gather_into_tensor(counts, torch.full((1,), len(x), device=x.device), group=named_group(group))
        numbers += counts[:rank].sum()
    return numbers


def _take(x: Tensor, row: Tensor, take: Tensor) -> Tensor:
    """x[row] in fp32 where ``take``, else zeros."""
    if not len(x):
        return torch.zeros(len(row), x.shape[1], dtype=torch.float32, device=x.device)
    return torch.where(take[:, None], x[row].float(), 0.0)
