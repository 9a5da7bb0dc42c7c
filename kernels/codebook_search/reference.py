"""The definition of codebook_search in plain PyTorch: scores in float64, a chunk of rows at a time, then argmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SCORES = 1 << 22  # at most 32 MB of scores exist at a time, however many vectors there are
SLACK = 1e-12  # above the error of a score relative to the vectors' lengths, width * 1.1e-16, up to a width of 9,000


def codebook_search_reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return (indices [N] int64, the vectors that were compared [N, D] fp32: l2(x) for cosine, x for euclidean)."""
    compared = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    v = codebook.double()
    unusable = ~v.isfinite().all(-1)  # [K]
    half_squares = v.square().sum(-1) / 2
    rows = max(1, CHUNK_SCORES // len(v))
    longest = v.where(~unusable[:, None], 0).norm(dim=-1).max()
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows].double()
        # Normalisation scales a row by a positive number and cannot change its argmax: score the given values exactly.
        scores = chunk @ v.T  # [rows, K]
        slack = SLACK * chunk.norm(dim=-1) * longest
        if metric == "euclidean":
            scores -= half_squares
            slack = slack + SLACK * longest.square()
        scores.masked_fill_(unusable, -torch.inf)
        _settle(scores, slack, chunk, v, half_squares if metric == "euclidean" else None)
        # argmax returns the first of equal maxima.
        best = scores.argmax(-1).where(chunk.isfinite().all(-1), 0)
        indices[start : start + rows] = best
        compared[start : start + rows] = F.normalize(chunk, dim=-1) if metric == "cosine" else chunk
    return indices, compared


def _settle(scores: Tensor, slack: Tensor, x: Tensor, v: Tensor, minus: Tensor | None) -> None:
    """Score again, in place, what is within ``slack`` of a row's best: a matrix product rounds a column at the edge of
    its tiles otherwise than the same column elsewhere, so equal codes have unequal scores."""
    close = (scores >= (scores.amax(-1) - slack)[:, None]) & scores.isfinite()
    tied = close.sum(-1) > 1
    pairs = (close & tied[:, None]).nonzero()
    for row, code in (part.unbind(1) for part in pairs.split(max(1, CHUNK_SCORES // max(v.shape[1], 1)))):
        again = (x[row] * v[code]).sum(-1)  # every pair's products are added in the same order
        scores[row, code] = again if minus is None else again - minus[code]
