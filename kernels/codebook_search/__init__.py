"""codebook_search: the nearest code of every vector, without an N x K matrix for the caller to pay for; draw_codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_metric, check_temperature, check_vectors
from ..sampling import row_numbers, salt
from .ops import codebook_search_op, draw_codes_op, nearest_codes_op
from .reference import look_up


class CodebookSearch(NamedTuple):
    """indices [N] int64; on request normalized [N, D] fp32, codes [N, D] as the codebook, distances [N] fp32.

    With k all but normalized have it as their second dimension.
    """

    indices: Tensor
    normalized: Tensor | None
    codes: Tensor | None
    distances: Tensor | None


def codebook_search(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "cosine",
    k: int | None = None,
    return_normalized: bool = False,
    return_codes: bool = False,
    return_distances: bool = False,
) -> CodebookSearch:
    """Find the nearest code of every vector.

    cosine:    ``indices[i] = argmax_j <l2(x_i), v_j>``. The codes are used as they are; keep them at unit length.
    euclidean: ``indices[i] = argmin_j ||x_i - v_j||^2``.

    The index is the one that exact arithmetic on the given values yields; ties go to the lowest index (docs/numerics.md
    says how, and to what depth). A zero vector has equal cosine similarity 0 to every code: the lowest index. A vector
    with NaN or Inf gets index 0 and a NaN distance. A code with NaN or Inf is never chosen, unless all have one: then
    every index is 0. No memory grows with N * K.

    Args:
        x: [N, D] vectors, fp32, fp16, bf16 or fp64, any strides, N >= 0.
        codebook: [K, D] codes v_j on the same device, K >= 1. Or [G, K, D], G codebooks that take turns: ``x[i]`` meets
            ``codebook[i % G]``, as the parts of vectors [N / G, G D] do in ``x.view(-1, D)``; on GPUs without more
            launches.
        metric: "cosine" (x is l2-normalized first, eps 1e-12) or "euclidean".
        k: find the k nearest codes, nearest first, equally near ones by their index. A vector with NaN or Inf gets
            0 to k - 1, and codes with NaN or Inf come last. On GPUs with float64 scores of all codes, beyond k = 64 in
            plain PyTorch: slower than the search for one.
        return_normalized: also return l2(x) (cosine; x itself in fp32 for euclidean), fp32.
        return_codes: also return ``codebook[indices]``.
        return_distances: also return the squared Euclidean distance between l2(x) (cosine) or x and its code, fp32.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming them.

    Source: arXiv 2208.06366 section 2.2, eq. 1. Not differentiable; see ``vector_quantize``.
    """
    check_metric(metric)
    check_vectors("codebook_search", x, codebook, several=True)
    # Detached, and not under no_grad(), which torch.export makes a region of its own that it cannot save.
    x, codebook, wanted = x.detach(), codebook.detach(), (return_normalized, return_codes, return_distances)
    if k is None:
        indices, *rest = codebook_search_op(x, codebook, metric, *wanted)
    elif 1 <= k <= codebook.shape[-2]:
        indices = nearest_codes_op(x, codebook, metric, k)
        rest = _beside_several(x, codebook, metric, indices, *wanted)
    else:
        raise ValueError(f"codebook_search: k must lie between 1 and the {codebook.shape[-2]} codes there are; got {k}")
    return CodebookSearch(indices, *(out if asked else None for out, asked in zip(rest, wanted, strict=True)))


def _beside_several(x: Tensor, codebook: Tensor, metric: str, indices: Tensor, *wanted: bool) -> list[Tensor | None]:
    """normalized, codes and distances of the k codes of every vector."""
    of_vectors, of_codes, of_distances = wanted
    compared = apart = None
    if of_vectors or of_distances:
        compared = F.normalize(x.double(), dim=-1).float() if metric == "cosine" else x.float()
    if of_distances and compared is not None:  # one code per vector at a time: all at once would be [N, k, D]
        squares = [(compared - look_up(codebook, of).float()).square().sum(-1) for of in indices.unbind(-1)]
        apart = torch.stack(squares, dim=-1).masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)
    return [compared, look_up(codebook, indices) if of_codes else None, apart]


def draw_codes(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    seed: int | Tensor,
    metric: str = "cosine",
    process_group: dist.ProcessGroup | str | None = None,
) -> Tensor:
    """Draw a code for every vector, code j with probability ``softmax_j(s_ij / temperature)``.

    ``s_ij = <l2(x_i), v_j>`` (cosine) or ``-||x_i - v_j||`` (euclidean). A draw is the argmax of ``s_ij / temperature``
    plus Gumbel noise, a function of the seed, the vector's number in the batch of all ranks and j, in float64: the same
    codes in every run, on every device and however the batch is spread over ranks, unless scores differ by float64's
    rounding alone. No memory grows with N * K. Vectors and codes with NaN or Inf: as in ``codebook_search``.

    Args:
        x: [N, D], this rank's vectors, any float dtype.
        codebook: [K, D], or [G, K, D] as in ``codebook_search``: each codebook then has a seed of its own,
            and the vectors of all with the same i // G have the same number.
        temperature: > 0; the lower, the nearer to the nearest code.
        seed: an int, or an int64 scalar on the vectors' device; another one draws other codes.
        process_group: the ranks that hold the batch, as in ``codebook_update``.

    Returns:
        indices [N] int64.

    Raises:
        ValueError, TypeError: naming what does not fit.
    """
    check_metric(metric)
    check_vectors("draw_codes", x, codebook, several=True)
    check_temperature("draw_codes", temperature)
    key = seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device=x.device)
    if codebook.dim() == 2:
        numbers = row_numbers(x, process_group)
    else:
        groups = len(codebook)
        numbers = row_numbers(x[::groups], process_group)[:, None].expand(-1, groups).flatten()
        keys = torch.as_tensor(salt(key, torch.arange(groups, device=x.device)))
        key = keys.expand(x.shape[0] // groups, -1).flatten()
    indices: Tensor = draw_codes_op(x.detach(), codebook.detach(), metric, float(temperature), key, numbers)
    return indices
