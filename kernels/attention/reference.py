"""The definition of attention in plain PyTorch, and of its derivative, which the fast version computes."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, N, H, d], and [2, B, H, N]: the largest score of each row and 1 / sum_j e^(score_j - largest).

    Autograd differentiates it.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias
    out = torch.softmax(scores, dim=-1).to(v.dtype) @ v
    largest = scores.detach().amax(-1, keepdim=True)
    inverse = 1 / torch.exp(scores.detach() - largest).sum(-1)
    return out.transpose(1, 2), torch.stack([largest[..., 0], inverse])


def attention_backward_reference(grad: Tensor, qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and of the bias [H, N, N].

    With p = softmax(s) and dp = grad v^T: ``ds = p (dp - sum_j p_j dp_j)``.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    p = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    grad = grad.transpose(1, 2)
    dp = (grad @ v.transpose(-2, -1)).to(p.dtype)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    narrow = ds.to(q.dtype)
    of_q, of_k = narrow @ k * scale, narrow.transpose(-2, -1) @ q * scale
    of_v = p.to(v.dtype).transpose(-2, -1) @ grad
    return torch.stack([of_q, of_k, of_v]).permute(1, 3, 0, 2, 4), ds.sum(0)
