"""codebook_search: the nearest code of every vector, without an N x K matrix for the caller to pay for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_metric, check_vectors
from ..native import native_ops
from .reference import codebook_search_reference


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
        metric: "cosine" (x is l2-normalised first, eps 1e-12) or "euclidean".
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
    indices, normalized, codes, distances = _search(
        x.detach(), codebook.detach(), metric, return_normalized, return_codes, return_distances
    )
    return CodebookSearch(
        indices,
        normalized if return_normalized else None,
        codes if return_codes else None,
        distances if return_distances else None,
    )


# An output that was not asked for is a tensor of size 0.
@torch.library.custom_op("beitv2_fast::codebook_search", mutates_args=())
def _search(
    x: Tensor, codebook: Tensor, metric: str, return_normalized: bool, return_codes: bool, return_distances: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices, normalized = codebook_search_reference(x, codebook, metric)
    codes = codebook[indices] if return_codes or return_distances else codebook.new_empty(0)
    distances = normalized.new_empty(0)
    if return_distances:
        distances = (normalized - codes.float()).square().sum(-1)
        distances.masked_fill_(~x.isfinite().all(-1), torch.nan)
    return (
        indices,
        normalized if return_normalized else normalized.new_empty(0),
        codes if return_codes else codebook.new_empty(0),
        distances,
    )


@_search.register_kernel("cpu")
def _search_cpu(
    x: Tensor, codebook: Tensor, metric: str, return_normalized: bool, return_codes: bool, return_distances: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (return_normalized, return_codes, return_distances)
    if torch.float64 in (x.dtype, codebook.dtype) or not native_ops():
        return _search._init_fn(x, codebook, metric, *wanted)
    return torch.ops.beitv2_fast_cpu.codebook_search(x, codebook, metric == "cosine", *wanted)


@_search.register_kernel("cuda")
def _search_cuda(
    x: Tensor, codebook: Tensor, metric: str, return_normalized: bool, return_codes: bool, return_distances: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (return_normalized, return_codes, return_distances)
    if torch.float64 in (x.dtype, codebook.dtype) or find_spec("triton") is None:
        return _search._init_fn(x, codebook, metric, *wanted)
    from .triton_kernel import codebook_search_triton  # only here: the package imports without triton

    return codebook_search_triton(x, codebook, metric, *wanted)


@_search.register_fake
def _search_fake(
    x: Tensor, codebook: Tensor, metric: str, return_normalized: bool, return_codes: bool, return_distances: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(x.shape if return_normalized else 0, dtype=torch.float32),
        codebook.new_empty((rows, codebook.shape[1]) if return_codes else 0),
        x.new_empty(rows if return_distances else 0, dtype=torch.float32),
    )
