"""ResidualVectorQuantizer: a stack of quantizers, each of which quantizes what the ones before it left."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .options import QuantizerOptions
from .quantizer import FusedVectorQuantizer, Quantized

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ResidualVectorQuantizer(nn.Module):
    """A vector as a sum of codes (SoundStream, arXiv 2107.03312 section III.C).

    ``r_1 = z``; stage i finds the code ``q_i`` nearest to ``r_i``; ``r_{i+1} = r_i - q_i``. The output is
    ``z + sg(sum_i q_i - z)``, the loss the sum of the stages' losses. Further indices refine the same vector, so a
    decoder may stop at any of them.

        quantizer = ResidualVectorQuantizer(num_codes=1024, dim=64, num_quantizers=8)
        out = quantizer(z)  # z [..., 64] -> out.quantized [..., 64], out.indices [..., 8]

    Each stage has a copy of a ``transform``.

    Args:
        num_codes: K.
        dim: D.
        num_quantizers: Q, the number of stages.
        share_stages: one codebook for all stages, which then takes Q steps in one forward; its k-means start sees the
            first stage's vectors only.
        dropout: in training, the share of samples (the first dimension) of which only the first 1 to Q - 1 stages take
            part, so that a decoder learns to do with fewer. The indices of the others are -1.
        options: of each stage, those of ``FusedVectorQuantizer``. The metric is Euclidean: a residual is no direction.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        num_quantizers: int,
        *,
        share_stages: bool = False,
        dropout: float = 0.0,
        **options: Unpack[QuantizerOptions],
    ):
        super().__init__()
        if num_quantizers < 1 or not 0 <= dropout <= 1:
            raise ValueError(
                f"num_quantizers must be at least 1 and dropout lie in [0, 1]; got {num_quantizers} and {dropout}"
            )
        if options.setdefault("metric", "euclidean") != "euclidean":
            raise ValueError("residual stages compare vectors with their length: metric must be 'euclidean'")
        if options.get("heads", 1) != 1:
            raise ValueError("residual stages have one head each; cut the width before, or use FusedVectorQuantizer")
        self.num_quantizers, self.dropout = num_quantizers, dropout
        seed = options.get("seed", 0)
        stages = 1 if share_stages else num_quantizers
        self.stages = nn.ModuleList(
            FusedVectorQuantizer(num_codes, dim, **(copy.deepcopy(options) | {"seed": seed + i})) for i in range(stages)
        )

    def stage(self, i: int) -> FusedVectorQuantizer:
        """The quantizer of stage i."""
        return cast(FusedVectorQuantizer, self.stages[i % len(self.stages)])

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """As ``FusedVectorQuantizer.forward``; indices and counts have the stages last and first: [..., Q], [Q, K]."""
        depth = self._depth(z)
        residual = _wide(z)
        total = torch.zeros_like(residual)
        stages = []
        for i in range(self.num_quantizers):
            out = self.stage(i)(residual, self._taking_part(z, mask, depth, i))
            stages.append(out)
            code = out.quantized.detach()
            # The gradient to z passes the sum once, not every stage; the losses keep theirs.
            residual, total = residual - code, total + code
        quantized = z + (total.to(z.dtype) - z).detach()
        if mask is not None:
            axis = self.stage(0).channel_axis(z)
            quantized = torch.where(mask.unsqueeze(axis), quantized, 0.0)
        return Quantized(
            quantized,
            torch.stack([out.indices for out in stages], dim=-1),
            torch.stack([out.loss for out in stages]).sum(),
            torch.stack([out.counts for out in stages]),
        )

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors -> indices [..., Q], all stages, and nothing else changes."""
        residual, indices = _wide(z), []
        for i in range(self.num_quantizers):
            indices.append(self.stage(i).encode(residual, mask))
            residual = residual - self.stage(i).decode(indices[-1])
        return torch.stack(indices, dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices [..., q] of the first q <= Q stages -> the sum of their codes, fp32; index -1 adds nothing."""
        if indices.dim() == 0 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(f"decode: indices must be [..., 1 to {self.num_quantizers}]; got {list(indices.shape)}")
        return torch.stack([self.stage(i).decode(part) for i, part in enumerate(indices.unbind(-1))]).sum(0)

    def freeze(self) -> None:
        """Keep all codebooks as they are until ``thaw``: see ``FusedVectorQuantizer.freeze``."""
        for i in range(len(self.stages)):
            self.stage(i).freeze()

    def thaw(self) -> None:
        """Let all codebooks learn again."""
        for i in range(len(self.stages)):
            self.stage(i).thaw()

    def usage(self, reset: bool = False) -> dict[str, float]:
        """Means over the stages of their ``usage``."""
        stages = [self.stage(i).usage(reset) for i in range(len(self.stages))]
        return {name: sum(stage[name] for stage in stages) / len(stages) for name in stages[0]}

    def _depth(self, z: Tensor) -> Tensor | None:
        """How many stages each sample takes part in, [B]; None: all in all."""
        if not self.training or not self.dropout or self.num_quantizers == 1:
            return None
        depth = torch.randint(1, self.num_quantizers, z.shape[:1], device=z.device)
        return torch.where(torch.rand(z.shape[:1], device=z.device) < self.dropout, depth, self.num_quantizers)

    def _taking_part(self, z: Tensor, mask: Tensor | None, depth: Tensor | None, i: int) -> Tensor | None:
        """The mask of stage i."""
        if depth is None:
            return mask
        shape = z.select(self.stage(0).channel_axis(z), 0).shape
        deep = (depth > i).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        return deep if mask is None else deep & mask


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
