"""The derivative of vector_quantize on a GPU. The forward needs no kernel of its own: the search writes codes and
distances in its pass, and the loss is their sum.

FLOPs 9 N D. Bytes: x, the codes and the gradient read once, the gradient for x written once; these bound it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codebook_update.triton_statistics import EPS_BITS


@triton.jit
def backward_kernel(
    x,
    quantized,
    grad,
    grad_loss,
    out,
    N,
    weight,
    stride_xn,
    stride_xd,
    stride_gn,
    stride_gd,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weight: 2 commitment_weight / (N D). quantized and out are contiguous."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    at = offs_n[:, None] * D + offs_d[None, :]
    far_d = offs_d.to(tl.int64)[None, :]  # a column of a transposed tensor may lie beyond 32 bits
    y = tl.load(x + offs_n[:, None] * stride_xn + far_d * stride_xd, mask=mask, other=0.0).to(tl.float32)
    if COSINE:
        wide = y.to(tl.float64)  # whose squares neither overflow nor vanish
        norm = tl.sqrt(tl.sum(wide * wide, axis=1))
        eps = tl.full([1], EPS_BITS, tl.int64).to(tl.float64, bitcast=True)
        tiny = norm < eps  # l2 divides by a constant there
        inverse = 1.0 / tl.maximum(norm, eps)
        y = (wide * inverse[:, None]).to(tl.float32)
    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_GRAD:
        pointers = grad + offs_n[:, None] * stride_gn + far_d * stride_gd
        g = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if HAS_LOSS:
        code = tl.load(quantized + at, mask=mask, other=0.0).to(tl.float32)
        g += tl.load(grad_loss).to(tl.float32) * weight * (y - code)
    if COSINE:
        along = tl.where(tiny, 0.0, tl.sum(g * y, axis=1))
        g = (g - y * along[:, None]) * inverse.to(tl.float32)[:, None]
    tl.store(out + at, g.to(out.dtype.element_ty), mask=mask)
