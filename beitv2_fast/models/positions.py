"""Positions at another image size: how a trained model's embeddings and bias tables become those of another grid.

As the reference does for fine-tuning at 384 and segmentation at 512: position embeddings bicubically; relative bias
tables by a cubic spline through the old entries, put at distances that grow geometrically, so that near offsets keep
their meaning and far ones are stretched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .vit import ViT

TABLE, EMBEDDING = "relative_position_bias_table", "pos_embed"
EXTRA = 3  # rows of a table that belong to CLS: to patches, from patches, to itself


def resize_positions(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict with positions of the grid of ``model``'s ViTs; everything else, and what fits already, untouched.

    Args:
        state: of the same backbone at another image size, whose grid was square; its bias table may be shared where
            the model has one a layer. model: what it shall be loaded into.

    Raises:
        CheckpointError: positions of a grid that is not square.
    """
    vits = {f"{name}." if name else "": module for name, module in model.named_modules() if isinstance(module, ViT)}
    result = dict(state)
    for name, value in state.items():
        owners = [prefix for prefix in vits if name.startswith(prefix)]
        if not owners or not name.endswith((TABLE, EMBEDDING)):
            continue
        h, w = vits[max(owners, key=len)].grid
        if name.endswith(EMBEDDING) and value.shape[1] != 1 + h * w:
            result[name] = resize_embedding(value, (h, w))
        elif name.endswith(TABLE) and len(value) != (2 * h - 1) * (2 * w - 1) + EXTRA:
            result[name] = resize_bias_table(value, (h, w))
    return result


def resize_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1, 1 + s*s, C] -> [1, 1 + h*w, C]: bicubic over the patches; CLS keeps its own."""
    side = _side(embedding.shape[1] - 1, EMBEDDING)
    patches = embedding[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([embedding[:, :1], patches.to(embedding.dtype)], dim=1)


def resize_bias_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Relative bias table [(2s-1)^2 + 3, H] -> [(2h-1)(2w-1) + 3, H]; the three CLS rows keep their values."""
    side = _side(len(table) - EXTRA, TABLE)
    rows, columns = (spline_matrix(geometric_offsets(side, new), _offsets(new)) for new in (2 * n - 1 for n in grid))
    old = table[:-EXTRA].double().cpu().unflatten(0, (side, side))  # [2s-1, 2s-1, H]
    new = torch.einsum("ys,xt,sth->yxh", rows, columns, old).flatten(0, 1)
    return torch.cat([new.to(table), table[-EXTRA:]])


def _side(count: int, what: str) -> int:
    side = round(math.sqrt(max(count, 0)))
    if side < 1 or side * side != count:
        raise CheckpointError(
            f"{what} has entries for {count} places, which is no square grid; only those are resized."
        )
    return side


def _offsets(size: int) -> Tensor:
    """-(size // 2) .. size // 2, the offsets of a table of ``size`` (odd)."""
    return torch.arange(size, dtype=torch.float64) - size // 2


def geometric_offsets(size: int, new_size: int) -> Tensor:
    """Where the ``size`` old entries lie on the new axis: 0, +-1, +-(1 + q), +-(1 + q + q^2), ...

    q in 1.01..1.5 is such that the last lies at the edge of the new table (found by bisection, as the reference does;
    for a smaller table it is 1.01, so the outermost entries fall off).
    """
    half = size // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**half) / (1 - q) > new_size // 2 else (q, high)
    distances = torch.cumsum(q ** torch.arange(half, dtype=torch.float64), 0)
    return torch.cat([-distances.flip(0), torch.zeros(1, dtype=torch.float64), distances])


def spline_matrix(nodes: Tensor, points: Tensor) -> Tensor:
    """W [points, nodes] such that W y is the cubic spline through (nodes, y) at the points; those outside are clamped.

    "Not a knot" at both ends, the interpolating spline of FITPACK and so of the reference. Fewer than four nodes: the
    polynomial through them.
    """
    n, points = len(nodes), points.clamp(nodes[0], nodes[-1])
    if n < 4:
        return torch.stack([_lagrange(nodes, points, i) for i in range(n)], dim=1)
    h = nodes.diff()
    # (system) m = (right) y for the second derivatives m: slopes are continuous, and the third derivative is at the
    # second and the last but one node.
    system, right = torch.zeros(n, n, dtype=nodes.dtype), torch.zeros(n, n, dtype=nodes.dtype)
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i, i - 1 : i + 2] = 6 * torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    system[0, :3] = torch.stack([h[1], -h[0] - h[1], h[0]])
    system[-1, -3:] = torch.stack([h[-1], -h[-2] - h[-1], h[-2]])
    second: Tensor = torch.linalg.solve(system, right)
    left = (torch.searchsorted(nodes, points, right=True) - 1).clamp(0, n - 2)
    width = h[left][:, None]
    a = (nodes[left + 1] - points)[:, None] / width
    b = 1 - a
    identity = torch.eye(n, dtype=nodes.dtype)
    bend = ((a**3 - a) * second[left] + (b**3 - b) * second[left + 1]) * width**2 / 6
    return a * identity[left] + b * identity[left + 1] + bend


def _lagrange(nodes: Tensor, points: Tensor, i: int) -> Tensor:
    others = [j for j in range(len(nodes)) if j != i]
    factors = [(points - nodes[j]) / (nodes[i] - nodes[j]) for j in others]
    return torch.stack(factors).prod(0) if factors else torch.ones_like(points)
