"""vector_quantize: search, straight-through output and commitment loss as one differentiable op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..checks import check_metric, check_vectors
from .reference import vector_quantize_reference


class VectorQuantize(NamedTuple):
    """quantized [N, D], indices [N] int64, the scalar commitment loss, and the vectors compared [N, D] (detached)."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    compared: Tensor


def vector_quantize(
    x: Tensor, codebook: Tensor, *, metric: str = "cosine", commitment_weight: float = 1.0
) -> VectorQuantize:
    """Replace every vector by its nearest code, with a gradient for x.

    With ``y = l2(x)`` (cosine) or ``y = x`` (euclidean) and ``code_i = v[argmin_j ||y_i - v_j||]``:
    ``quantized = y + sg(code - y)`` (straight-through: its value is the code, its gradient reaches y) and
    ``loss = commitment_weight * mean((sg(code) - y)^2)``. The codebook gets no gradient.

    Args:
        x: [N, D], N >= 1, any float dtype; computed in fp32 (fp64 stays). codebook: [K, D].

    Returns:
        VectorQuantize(quantized, indices, loss, compared).

    Source: arXiv 2208.06366 eq. 2 and 3 (cosine); arXiv 1711.00937 eq. 2 and 3.
    """
    check_metric(metric)
    check_vectors("vector_quantize", x, codebook)
    return VectorQuantize(*vector_quantize_reference(x, codebook, metric, commitment_weight))
