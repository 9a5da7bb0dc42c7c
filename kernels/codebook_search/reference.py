"""The definition of codebook_search in plain PyTorch: scores in float64, a chunk of rows at a time, then argmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..counter_random import as_uniform, random_bits

CHUNK_SCORES = 1 << 22  # at most 32 MB of scores exist at a time, however many vectors there are
EXPONENTS = -400, 500  # between these powers of two no square or sum of products leaves the range of float64
NEAREST = 1e-8  # the least squared distance of a similarity, whose gradient has the distance below the line
SLACK = 1e-12  # above the error of a score relative to the vectors' lengths, width * 1.1e-16, up to a width of 9,000


def codebook_search_reference(x: Tensor, codebook: Tensor, metric: str, k: int = 0) -> tuple[Tensor, Tensor]:
    """Return (indices [N] int64, the vectors that were compared [N, D] fp32: l2(x) for cosine, x for euclidean).

    With k > 0 the indices are [N, k], those of the k best scores, best first.
    """
    compared = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    indices = torch.empty((len(x), k) if k else len(x), dtype=torch.int64, device=x.device)
    v, unusable = _finite(codebook)
    # Powers of two divide the codebook, and each row, where their squares would overflow or vanish: exact, and no score
    # changes its place.
    exponent = _exponent(v.view(-1))
    scale = exponent - exponent.clamp(*EXPONENTS)
    v = torch.ldexp(v, -scale)
    half_squares = v.square().sum(-1) / 2
    rows = max(1, CHUNK_SCORES // len(v))
    longest = v.norm(dim=-1).max()
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
        finite = chunk.isfinite().all(-1)
        wanted = torch.arange(max(k, 1), device=x.device)
        best = _first(scores, slack, scaled, v, minus, len(wanted)).where(finite[:, None], wanted)
        indices[start : start + rows] = best if k else best[:, 0]
        compared[start : start + rows] = F.normalize(chunk, dim=-1) if metric == "cosine" else chunk
    return indices, compared


def _finite(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in float64 [K, D], zeros in the place of those with NaN or Inf, and which these are [K]."""
    unusable = ~codebook.isfinite().all(-1)
    v = codebook.double().where(~unusable[:, None], 0)
    return v.contiguous(), unusable  # sums of strided rows are added in another order, row by row


def _exponent(t: Tensor) -> Tensor:
    """The power of two above the largest |t_i| of the last dimension; 0 for zeros, and where one is not finite."""
    return torch.frexp(t.abs().amax(-1).nan_to_num(0, 0)).exponent


def _first(scores: Tensor, slack: Tensor, x: Tensor, v: Tensor, minus: tuple[Tensor, Tensor] | None, k: int) -> Tensor:
    """The columns of every row's k largest scores, the largest first; of equal ones the lower column first. What is
    within ``slack`` of the k-th is scored again: a matrix product rounds a column at the edge of its tiles otherwise
    than the same column elsewhere, so equal codes have unequal scores."""
    close = scores >= (scores.topk(k).values[:, -1] - slack)[:, None]
    pairs, counts = close.nonzero(), close.sum(-1)
    row, code = pairs.unbind(1)
    again = _scores_of(pairs, x, v, minus).where(scores[row, code].isfinite(), -torch.inf)
    place = torch.arange(len(row), device=x.device) - (counts.cumsum(0) - counts)[row]
    candidates = scores.new_full((len(scores), max(k, int(counts.max()))), -torch.inf)  # with ties more than k
    columns = torch.zeros_like(candidates, dtype=torch.int64)
    candidates[row, place], columns[row, place] = again, code
    return columns.gather(1, candidates.sort(dim=-1, descending=True, stable=True).indices[:, :k])


def _scores_of(pairs: Tensor, x: Tensor, v: Tensor, minus: tuple[Tensor, Tensor] | None) -> Tensor:
    """The scores of pairs [P, 2] of a row and a code, the products of each added in the same order."""
    scores = [x.new_empty(0)]
    for row, code in (part.unbind(1) for part in pairs.split(max(1, CHUNK_SCORES // max(v.shape[1], 1)))):
        again = (x[row] * v[code]).sum(-1)
        scores.append(again if minus is None else again - minus[0][code] * minus[1][row])
    return torch.cat(scores)


def numbered(indices: Tensor, groups: int, num_codes: int) -> Tensor:
    """The indices [N, ...] of rows that belong to codebooks [G, K, D] in turn, in all their codes [G K, D]; what is no
    index of its own codebook is none of all."""
    if groups == 1:
        return indices
    first = torch.arange(0, groups * num_codes, num_codes, device=indices.device)
    in_all: Tensor = indices.unflatten(0, (-1, groups)) + first.view(-1, *[1] * (indices.dim() - 1))
    too_large = indices + groups * num_codes
    return indices.where(indices < 0, in_all.flatten(0, 1).where(indices < num_codes, too_large))


def look_up(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes [N, ..., D] of rows that belong to the codebook [K, D], or in turn to those of [G, K, D]."""
    codes = codebook.flatten(0, -2)
    return F.embedding(numbered(indices, len(codes) // codebook.shape[-2], codebook.shape[-2]), codes)


def _distances(x: Tensor, v: Tensor) -> Tensor:
    """||x_i - v_j||, from the differences: squares that are expanded lose what vectors far from zero differ by."""
    scale = (torch.maximum(_exponent(x), _exponent(v.view(-1))) - EXPONENTS[1]).clamp(min=0)
    distances = x.new_empty(len(x), len(v))
    for s in scale.unique():  # 0 where no square overflows
        pair = torch.ldexp(x[scale == s], -s), torch.ldexp(v, -s)
        distances[scale == s] = torch.ldexp(torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist"), s)
    return distances


def draw_codes_reference(
    x: Tensor, codebook: Tensor, metric: str, temperature: float, key: Tensor, numbers: Tensor
) -> Tensor:
    """The code j of the largest ``s_ij / temperature - log(-log u_ij)``; u_ij is a function of (key, numbers_i, j).

    key: [], or [N], one for each row."""
    bits = random_bits(key, numbers)
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    v, unusable = _finite(codebook)
    columns = torch.arange(len(v), device=x.device)
    rows = max(1, CHUNK_SCORES // len(v))
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows].double()
        if metric == "cosine":  # rows so long that their squares overflow, divided by a power of two
            scale = (_exponent(chunk) - EXPONENTS[1]).clamp(min=0)
            scores = F.normalize(torch.ldexp(chunk, -scale[:, None]), dim=-1) @ v.T
        else:
            scores = -_distances(chunk, v).clamp(min=NEAREST**0.5)
        scores.div_(temperature)
        scores -= as_uniform(random_bits(bits[start : start + rows, None], columns)).log_().neg_().log_()
        scores.masked_fill_(unusable, -torch.inf)
        indices[start : start + rows] = scores.argmax(-1).where(chunk.isfinite().all(-1), 0)
    return indices
