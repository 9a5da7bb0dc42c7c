"""The definition of vector_quantize in plain PyTorch, and of its derivative, which the fast versions compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codebook_search import codebook_search
from ..codebook_update.reference import EPS


def vector_quantize_reference(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (quantized, indices, loss, compared); autograd differentiates it."""
    x = x if x.dtype == torch.float64 else x.float()
    y = F.normalize(x, dim=-1) if metric == "cosine" else x
    indices = codebook_search(x.detach(), codebook.detach(), metric=metric).indices
    codes = codebook[indices].to(y.dtype)
    loss = commitment_weight * _mean_square(y - codes.detach())
    if codebook_weight:
        loss = loss + codebook_weight * _mean_square(y.detach() - codes)
    return y + (codes - y).detach(), indices, loss, y.detach()


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / max(1, difference.numel())  # the mean over nothing is 0, not NaN


def vector_quantize_backward_reference(
    x: Tensor,
    quantized: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    commitment_weight: float,
    metric: str,
) -> Tensor:
    """The gradient for x. With y = l2(x): g = grad_quantized + grad_loss 2 beta / (N D) (y - quantized), and
    ``dx = (g - y <g, y>) / |x|``; without the projection where |x| < 1e-12, where l2 divides by a constant."""
    dtype, quantized = x.dtype, quantized.detach()
    x = x if dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # squares overflow fp32
    y = (x / norm.clamp(min=EPS)).to(x.dtype) if metric == "cosine" else x
    g = torch.zeros_like(x) if grad_quantized is None else grad_quantized.to(x.dtype)
    if grad_loss is not None:
        g = g + grad_loss.to(x.dtype) * (2 * commitment_weight / max(1, x.numel())) * (y - quantized)
    if metric == "cosine":
        along = (g * y).sum(-1, keepdim=True)
        g = torch.where(norm < EPS, g, g - y * along) / norm.clamp(min=EPS)
    return g.to(dtype).contiguous()
