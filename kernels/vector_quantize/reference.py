"""The definition of vector_quantize in plain PyTorch, and of its derivative, which the fast versions compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codebook_search import codebook_search
from ..codebook_search.reference import look_up
from ..codebook_update.reference import EPS

SHORTEST = 1e-6  # the shortest vector that still has a direction


def vector_quantize_reference(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    commitment_weight: float,
    codebook_weight: float = 0.0,
    *,
    indices: Tensor | None = None,
    keep: Tensor | None = None,
    gradient: str = "straight_through",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (quantized, indices, loss, compared); autograd differentiates it.

    The fast versions have no ``indices`` [N] of codes that were chosen otherwise, no ``keep`` [N], False for vectors
    that do not count and come out as zeros, and no gradient of the "codes" themselves.
    """
    shortest = shortest_of(x)
    x = x if x.dtype == torch.float64 else x.float()
    y = F.normalize(x, dim=-1) if metric == "cosine" else x
    if indices is None:
        indices = codebook_search(x, codebook, metric=metric).indices
    codes = look_up(codebook, indices).to(y.dtype)
    loss = commitment_weight * _mean_square(codes.detach() - y, keep)
    if codebook_weight:
        loss = loss + codebook_weight * _mean_square(codes - y.detach(), keep)
    if gradient == "codes":
        quantized = codes
    else:
        codes = codes.detach()
        quantized = rotate_to(y, codes, shortest) if gradient == "rotation" else y + (codes - y).detach()
    return quantized if keep is None else torch.where(keep[:, None], quantized, 0.0), indices, loss, y.detach()


def _mean_square(difference: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the squares over the rows that count; 0, and not NaN, over none, in exported programs, too."""
    if keep is None:
        return (difference.square().mean(-1) / difference.shape[0]).sum()
    count = keep.sum() * difference.shape[-1]
    return torch.where(keep[:, None], difference, 0.0).square().sum() / count.clamp(min=1)


class _Rotation(torch.autograd.Function):
    """See ``rotate_to``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, target: Tensor, shortest: float) -> Tensor:
        return target.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.shortest = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, target = ctx.saved_tensors
        return _rotate_back(grad, x, target, ctx.shortest), None, None


def _rotate_back(grad: Tensor, x: Tensor, target: Tensor, shortest: float) -> Tensor:
    with torch.no_grad():
        norm, target_norm = (t.norm(dim=-1, keepdim=True) for t in (x, target))
        u, q = x / norm.clamp(min=SHORTEST), target / target_norm.clamp(min=SHORTEST)
        half = F.normalize(u + q, dim=-1, eps=SHORTEST)
        scale = target_norm / norm.clamp(min=SHORTEST)
    along_half, along_q = ((grad * t).sum(-1, keepdim=True) for t in (half, q))
    rotated = (grad - 2 * along_half * half + 2 * along_q * u) * scale
    return torch.where(norm < shortest, grad, rotated)


def shortest_of(x: Tensor) -> float:
    """The length below which a vector has no direction; in fp16 6e-5, below which few bits are left."""
    return max(SHORTEST, torch.finfo(x.dtype).smallest_normal)


def rotate_to(x: Tensor, target: Tensor, shortest: float = SHORTEST) -> Tensor:
    """The target as a rotation and scaling of x that are constant for the gradient: [N, D], [N, D] -> [N, D].

    ``R x |target| / |x|``, which is the target, with the R of section 4.2 that rotates x onto the target in their
    common plane; a gradient g reaches x as ``R^T g |target| / |x|``. An x shorter than ``shortest`` has no direction to
    rotate: its gradient passes straight through.
    """
    rotated: Tensor = _Rotation.apply(x, target, shortest)
    return rotated


def vector_quantize_backward_reference(
    x: Tensor,
    quantized: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    commitment_weight: float,
    metric: str,
    gradient: str = "straight_through",
) -> Tensor:
    """The gradient for x. With y = l2(x): g = grad_quantized + grad_loss 2 beta / (N D) (y - quantized), and
    ``dx = (g - y <g, y>) / |x|``; without the projection where |x| < 1e-12, where l2 divides by a constant. With
    gradient="rotation" grad_quantized passes ``rotate_to`` first."""
    dtype, quantized, shortest = x.dtype, quantized.detach(), shortest_of(x)
    x = x if dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # squares overflow fp32
    y = (x / norm.clamp(min=EPS)).to(x.dtype) if metric == "cosine" else x
    g = torch.zeros_like(x) if grad_quantized is None else grad_quantized.to(x.dtype, copy=True)  # no op's result
    g = _rotate_back(g, y, quantized, shortest) if gradient == "rotation" else g
    if grad_loss is not None:
        g = g + grad_loss.to(x.dtype) * (2 * commitment_weight / max(1, x.numel())) * (y - quantized)
    if metric == "cosine":
        along = (g * y).sum(-1, keepdim=True)
        g = torch.where(norm < EPS, g, g - y * along) / norm.clamp(min=EPS)
    return g.to(dtype).contiguous()
