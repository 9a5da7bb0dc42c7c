"""Vectors of the batch for dead codes to restart at."""

from __future__ import annotations

import torch
from torch import Tensor


def fresh_rows(x: Tensor, num_codes: int, seed: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """This rank's share of [K, D] fp32 vectors to restart codes at; the sum of the bits over ranks is the whole.

    Code j gets a vector from one rank, drawn by the seed. The other ranks contribute zeros, so the sum is exact and
    no rank needs to know how many vectors another holds. On a rank the vectors are distinct as long as there are
    enough. A rank without vectors contributes NaN, at which no code restarts.
    """
    generator = torch.Generator().manual_seed(seed)
    mine = torch.randperm(num_codes, generator=generator)[rank::ranks].to(x.device)
    if x.shape[0] == 0:
        rows = x.new_full((len(mine), x.shape[1]), torch.nan, dtype=torch.float32)
    else:
        order = torch.randperm(x.shape[0], generator=generator.manual_seed(seed + rank)).to(x.device)
        rows = x[order[torch.arange(len(mine), device=x.device) % x.shape[0]]].float()
    return rows.new_zeros(num_codes, x.shape[1]).index_copy_(0, mine, rows)
