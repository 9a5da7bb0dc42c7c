"""The definition of codebook_search in plain PyTorch: scores in float64, a chunk of rows at a time, then argmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SCORES = 1 << 22  # at most 32 MB of scores exist at a time, however many vectors there are
EXPONENTS = -400, 500  # between these powers of two no square or sum of products leaves the range of float64
SLACK = 1e-12  # above the error of a score relative to the vectors' lengths, width * 1.1e-16, up to a width of 9,000


def codebook_search_reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return (indices [N] int64, the vectors that were compared [N, D] fp32: l2(x) for cosine, x for euclidean)."""
    compared = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    v = codebook.double()
    unusable = ~v.isfinite().all(-1)  # [K]
    # Powers of two divide the codebook, and each row, where their squares would overflow or vanish: exact, and no score
    # changes its place.
    exponent = _exponent(v.where(~unusable[:, None], 0).reshape(-1))
    scale = exponent - exponent.clamp(*EXPONENTS)
    v = torch.ldexp(v, -scale)
    half_squares = v.square().sum(-1) / 2
    rows = max(1, CHUNK_SCORES // len(v))
    longest = v.where(~unusable[:, None], 0).norm(dim=-1).max()
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows].double()
        row_scale = torch.maximum(scale, _exponent(chunk) - EXPONENTS[1])
        # Normalization scales a row by a positive number and cannot change its argmax: score the given values exactly.
        scaled = torch.ldexp(chunk, -row_scale[:, None])
        scores = scaled @ v.T  # [rows, K]
        slack, minus = SLACK * scaled.norm(dim=-1) * longest, None
        if metric == "euclidean":
            minus = half_squares, torch.ldexp(torch.ones_like(slack), scale - row_scale)
            scores.addcmul_(minus[0], minus[1][:, None], value=-1)
            slack = slack + SLACK * longest.square() * minus[1]
        scores.masked_fill_(unusable, -torch.inf)
        _settle(scores, slack, scaled, v, minus)
        # argmax returns the first of equal maxima.
        best = scores.argmax(-1).where(chunk.isfinite().all(-1), 0)
        indices[start : start + rows] = best
        compared[start : start + rows] = F.normalize(chunk, dim=-1) if metric == "cosine" else chunk
    return indices, compared


def _exponent(t: Tensor) -> Tensor:
    """The power of two above the largest |t_i| of the last dimension; 0 for zeros, and where one is not finite."""
    return torch.frexp(t.abs().amax(-1).nan_to_num(0, 0)).exponent


def _settle(scores: Tensor, slack: Tensor, x: Tensor, v: Tensor, minus: tuple[Tensor, Tensor] | None) -> None:
    """Score again, in place, what is within ``slack`` of a row's best: a matrix product rounds a column at the edge of
    its tiles otherwise than the same column elsewhere, so equal codes have unequal scores."""
    close = (scores >= (scores.amax(-1) - slack)[:, None]) & scores.isfinite()
    tied = close.sum(-1) > 1
    pairs = (close & tied[:, None]).nonzero()
    for row, code in (part.unbind(1) for part in pairs.split(max(1, CHUNK_SCORES // max(v.shape[1], 1)))):
        again = (x[row] * v[code]).sum(-1)  # every pair's products are added in the same order
        scores[row, code] = again if minus is None else again - minus[0][code] * minus[1][row]
