"""The definition of vector_quantize in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codebook_search import codebook_search


def vector_quantize_reference(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if x.dtype == torch.float64 else x.float()
    y = F.normalize(x, dim=-1) if metric == "cosine" else x
    indices = codebook_search(x.detach(), codebook, metric=metric).indices
    codes = codebook.detach()[indices].to(y.dtype)
    loss = commitment_weight * F.mse_loss(y, codes) if len(y) else y.sum()  # the mean over nothing is 0, not NaN
    return y + (codes - y).detach(), indices, loss, y.detach()
