"""codebook_search: the nearest code of every vector, without an N x K matrix for the caller to pay for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..checks import check_metric, check_vectors
from .ops import codebook_search_op


class CodebookSearch(NamedTuple):
    """indices [N] int64; on request normalized [N, D] fp32, codes [N, D] as the codebook, distances [N] fp32."""

    indices: Tensor
    normalized: Tensor | None
    codes: Tensor | None
    distances: Tensor | None


def codebook_search(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "cosine",
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
        codebook: [K, D] codes v_j on the same device, K >= 1.
        metric: "cosine" (x is l2-normalized first, eps 1e-12) or "euclidean".
        return_normalized: also return l2(x) (cosine; x itself in fp32 for euclidean), fp32.
        return_codes: also return ``codebook[indices]``.
        return_distances: also return the squared Euclidean distance between l2(x) (cosine) or x and its code, fp32.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming them.

    Source: arXiv 2208.06366 section 2.2, eq. 1. Not differentiable; see ``vector_quantize``.
    """
    check_metric(metric)
    check_vectors("codebook_search", x, codebook)
    # Detached, and not under no_grad(), which torch.export makes a region of its own that it cannot save.
    indices, normalized, codes, distances = codebook_search_op(
        x.detach(), codebook.detach(), metric, return_normalized, return_codes, return_distances
    )
    return CodebookSearch(
        indices,
        normalized if return_normalized else None,
        codes if return_codes else None,
        distances if return_distances else None,
    )
