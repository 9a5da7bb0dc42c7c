"""The rotation trick: another way for the gradient to pass the quantizer (arXiv 2410.06424)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # the shortest vector that still has a direction


def rotate_to(x: Tensor, target: Tensor, shortest: float = EPS) -> Tensor:
    """The target as a rotation and scaling of x that are constant for the gradient: [N, D], [N, D] -> [N, D].

    ``R x |target| / |x|`` with the R of section 4.2 that rotates x onto the target in their common plane; a gradient g
    reaches x as ``R^T g |target| / |x|``. An x shorter than ``shortest`` has no direction to rotate: it passes straight
    through.
    """
    with torch.no_grad():
        norm, target_norm = (t.norm(dim=-1, keepdim=True) for t in (x, target))
        u, q = x / norm.clamp(min=EPS), target / target_norm.clamp(min=EPS)
        half = F.normalize(u + q, dim=-1, eps=EPS)
        scale = target_norm / norm.clamp(min=EPS)
    along_half = (x * half).sum(-1, keepdim=True)
    along_u = (x * u).sum(-1, keepdim=True)
    rotated = (x - 2 * along_half * half + 2 * along_u * q) * scale
    return torch.where(norm < shortest, x + (target - x).detach(), rotated)
