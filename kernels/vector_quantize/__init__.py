"""vector_quantize: search, straight-through output and commitment loss as one differentiable op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..checks import check_metric, check_vectors
from .ops import quantize


class VectorQuantize(NamedTuple):
    """quantized [N, D], indices [N] int64, the scalar loss, and on request the vectors compared [N, D] (detached)."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    compared: Tensor | None


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "cosine",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    return_compared: bool = False,
    gradient: str = "straight_through",
) -> VectorQuantize:
    """Replace every vector by its nearest code, with a gradient for x.

    With ``y = l2(x)`` (cosine) or ``y = x`` (euclidean) and ``code_i = v[argmin_j ||y_i - v_j||]``:
    ``quantized = y + sg(code - y)`` (straight-through: its value is the code, its gradient reaches y) and
    ``loss = commitment_weight * mean((y - sg(code))^2) + codebook_weight * mean((sg(y) - code)^2)``.

    Through the normalization, with g the gradient for y: ``dx = (g - y <g, y>) / |x|``. The gradient for the codebook
    comes from codebook_weight only, and is the same bits whatever the order of the rows and the number of threads;
    with codebook_weight 0, for codebooks that move by EMA, there is none, and the codebook may change before backward.

    Args:
        x: [N, D], any float dtype and strides, N >= 0; computed in fp32 (fp64 stays), also under autocast. Its gradient
            has its dtype.
        codebook: [K, D], or [G, K, D] as in ``codebook_search``; cosine takes the codes as they are: keep them at unit
            length.
        commitment_weight: beta.
        codebook_weight: of VQ-VAE's codebook loss.
        return_compared: also return y, in fp32.
        gradient: "straight_through", or "rotation" (arXiv 2410.06424): of the rotation and scaling that take y to its
            code, constant for the gradient. A y shorter than 1e-6 (fp16: 6e-5) has no direction to rotate.

    Returns:
        VectorQuantize(quantized, indices, loss, compared): fp32 (fp64 for fp64 x). With N = 0 the loss is 0. A vector
        with NaN or Inf makes the loss NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a gradient that do not fit, naming them.

    Source: arXiv 2208.06366 eq. 2 and 3 (cosine); arXiv 1711.00937 eq. 2 and 3.
    """
    check_metric(metric)
    check_vectors("vector_quantize", x, codebook, several=True)
    if gradient not in ("straight_through", "rotation"):
        raise ValueError(f"vector_quantize: gradient must be 'straight_through' or 'rotation'; got {gradient!r}")
    weights = commitment_weight, codebook_weight
    quantized, indices, loss, compared = quantize(x, codebook, metric, *weights, return_compared, gradient)
    return VectorQuantize(quantized, indices, loss, compared if return_compared else None)
