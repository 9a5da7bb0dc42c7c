"""How a quantizer reads vectors out of its input's shape, and writes results back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Inputs [..., dim], or [B, dim, ...] with ``channel_last=False``; each of ``heads`` parts of a vector gets a code.

    Rows are what a codebook sees, [groups, N, dim / heads]: with one codebook for each head, groups = heads and N is
    the number of vectors; with one codebook for all, groups = 1 and N is the number of vectors times heads.
    """

    dim: int
    heads: int
    groups: int
    channel_last: bool

    def axis(self, z: Tensor) -> int:
        return -1 if self.channel_last or z.dim() < 2 else 1

    def rows(self, z: Tensor) -> Tensor:
        """z -> [G, N, D]."""
        if not z.is_floating_point():
            raise TypeError(f"expected vectors of a floating-point dtype; got {z.dtype}. Cast them with .float().")
        if z.dim() == 0 or z.shape[self.axis(z)] != self.dim:
            where = "in the last dimension" if self.channel_last else "in dimension 1 (channel_last=False)"
            raise ValueError(f"expected vectors of width {self.dim} {where}; got {list(z.shape)}")
        rows = z.movedim(self.axis(z), -1).reshape(-1, self.groups, self.dim // self.heads)
        return rows.transpose(0, 1) if self.groups > 1 else rows.view(1, -1, self.dim // self.heads)

    def unrows(self, rows: Tensor, z: Tensor) -> Tensor:
        """[G, N, D] -> the shape and dtype of z."""
        rows = rows.transpose(0, 1).reshape(z.movedim(self.axis(z), -1).shape)
        return rows.movedim(-1, self.axis(z)).to(z.dtype)

    def index_shape(self, z: Tensor) -> torch.Size:
        """The shape of z without the channels."""
        return z.movedim(self.axis(z), -1).shape[:-1]

    def unrow_indices(self, indices: Tensor, z: Tensor) -> Tensor:
        """[G, N] -> the shape of z without the channels, and with several heads their number last."""
        if self.heads == 1:
            return indices.view(self.index_shape(z))
        return indices.transpose(0, 1).reshape(*self.index_shape(z), self.heads)

    def row_mask(self, mask: Tensor, z: Tensor) -> Tensor:
        """The mask for the rows of each codebook: [N]."""
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True for the vectors that count; got {mask.dtype}")
        expected = self.index_shape(z)
        if mask.shape != expected:
            raise ValueError(f"mask must be {list(expected)} for vectors {list(z.shape)}; got {list(mask.shape)}")
        return mask.reshape(-1, 1).expand(-1, self.heads // self.groups).reshape(-1)
