"""Scaled dot-product attention with an additive bias: one function, the fastest form for each device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v``.

    Args:
        q, k, v: [B, H, N, d]. bias: [1 or B, H, N, N] or None, may need a gradient.

    Returns:
        [B, H, N, d] in q's dtype.
    """
    if q.device.type == "cpu" and bias is not None and bias.requires_grad:
        # A bias with a gradient sends SDPA to its slow math path on the CPU: the plain form is faster there.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
