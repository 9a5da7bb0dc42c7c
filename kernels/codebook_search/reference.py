"""The definition of codebook_search in plain PyTorch: scores in float64, a chunk of rows at a time, then argmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SCORES = 1 << 22  # at most 32 MB of scores exist at a time, however many vectors there are


def codebook_search_reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return (indices [N] int64, the vectors that were compared [N, D] fp32: l2(x) for cosine, x for euclidean)."""
    compared = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    v = codebook.double()
    unusable = ~v.isfinite().all(-1)  # [K]
    half_squares = v.square().sum(-1) / 2
    rows = max(1, CHUNK_SCORES // len(v))
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows].double()
        # Normalisation scales a row by a positive number and cannot change its argmax: score the given values exactly.
        scores = chunk @ v.T  # [rows, K]
        if metric == "euclidean":
            scores -= half_squares
        scores.masked_fill_(unusable, -torch.inf)
        # argmax returns the first of equal maxima.
        best = scores.argmax(-1).where(chunk.isfinite().all(-1), 0)
        indices[start : start + rows] = best
        compared[start : start + rows] = F.normalize(chunk, dim=-1) if metric == "cosine" else chunk
    return indices, compared
