"""The definition of codebook_search in plain PyTorch: an N x K score matrix in float64, then argmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def codebook_search_reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return (indices [N] int64, the vectors that were compared [N, D] fp32: l2(x) for cosine, x for euclidean)."""
    compared = F.normalize(x.float(), dim=-1) if metric == "cosine" else x.float()
    v = codebook.double()
    # Normalisation scales a row by a positive number and cannot change its argmax: score the given values exactly.
    scores = x.double() @ v.T  # [N, K]
    if metric == "euclidean":
        scores = 2 * scores - v.square().sum(-1)
    finite = x.isfinite().all(-1)
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    indices = torch.where(finite, scores.argmax(-1), 0)  # argmax returns the first of equal maxima
    return indices, compared
