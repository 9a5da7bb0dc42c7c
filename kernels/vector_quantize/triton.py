"""The launch of vector_quantize's kernel."""

from __future__ import annotations

from torch import Tensor

from ..codebook_update.triton import tile_shape
from ..gpu import cdiv, device_of
from .triton_backward import backward_kernel


def vector_quantize_backward_triton(
    x: Tensor,
    quantized: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    commitment_weight: float,
    metric: str,
) -> Tensor:
    count, dim = x.shape
    out = x.new_empty(x.shape)
    if count == 0:
        return out
    if grad_quantized is not None and 0 in grad_quantized.stride():
        grad_quantized = grad_quantized.contiguous()  # Triton would sum a broadcast one in another order
    block_n, block_d = tile_shape(dim)
    with device_of(x):
        backward_kernel[(cdiv(count, block_n),)](
            x,
            quantized.contiguous(),
            grad_quantized,
            grad_loss,
            out,
            count,
            2 * commitment_weight / (count * dim),
            *x.stride(),
            *((0, 0) if grad_quantized is None else grad_quantized.stride()),
            D=dim,
            COSINE=metric == "cosine",
            HAS_GRAD=grad_quantized is not None,
            HAS_LOSS=grad_loss is not None,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
    return out
