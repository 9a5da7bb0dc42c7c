"""attention with an additive bias that learns, for which SDPA's fused paths are slow (GPUs) or none (CPUs)."""

from __future__ import annotations

from torch import Tensor

from .ops import attention_op

__all__ = ["attention"]


def attention(qkv: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """``softmax(scale q k^T + bias) v`` for queries, keys and values that lie side by side.

    FLOPs: 4 B H N^2 d forward, 10 B H N^2 d backward, which computes the scores again: besides the result only two
    numbers per row are kept. A few rows of scores exist at a time: on the CPU in C++, in fp32 whatever the dtype of
    qkv; on GPUs in Triton, if qkv is bf16 or fp16 and d at most 128, with the bias rounded to qkv's dtype (fp16: it
    must stay below 65504 scale) and its gradient summed in fp32. Else the definition in plain PyTorch runs, which
    holds all scores. The bits of all gradients are independent of the number of threads and the same in every run.

    Args:
        qkv: [B, N, 3, H, d], as a linear layer makes it: fp32, bf16, fp16 or fp64.
        bias: [1, H, N, N] or [H, N, N], the same for all images, or None. It may need a gradient, which is summed in
            the bias's dtype over layers that share it.
        scale: of the scores; None: ``d ** -0.5``.

    Returns:
        [B, N, H, d] in qkv's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, N, 3, H, d]; got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be of a floating-point dtype; got {qkv.dtype}")
    _, N, _, H, d = qkv.shape
    if bias is not None:
        if bias.dim() == 4 and bias.shape[0] == 1:
            bias = bias.squeeze(0)
        if bias.shape != (H, N, N):
            raise ValueError(f"bias must be [1, {H}, {N}, {N}] or [{H}, {N}, {N}]; got {list(bias.shape)}")
        if bias.device != qkv.device:
            raise ValueError(f"qkv is on {qkv.device}, bias on {bias.device}; move one of them")
    out: Tensor = attention_op(qkv, bias, d**-0.5 if scale is None else float(scale))[0]
    return out
