"""A stack of quantizers, each of which quantizes what the ones before it left, by itself and in groups of the width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search
from .options import QuantizerOptions
from .quantizer import FusedVectorQuantizer, Quantized

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Quantizers(nn.Module):
    """What is done to all quantizers inside."""

    def _quantizers(self) -> list[FusedVectorQuantizer]:
        return [module for module in self.modules() if isinstance(module, FusedVectorQuantizer)]

    def freeze(self) -> None:
        """Keep all codebooks as they are until ``thaw``: see ``FusedVectorQuantizer.freeze``."""
        for quantizer in self._quantizers():
            quantizer.freeze()

    def thaw(self) -> None:
        """Let all codebooks learn again."""
        for quantizer in self._quantizers():
            quantizer.thaw()

    def usage(self, reset: bool = False) -> dict[str, float]:
        """Means over the codebooks of their ``usage``."""
        each = [quantizer.usage(reset) for quantizer in self._quantizers()]
        return {name: sum(usage[name] for usage in each) / len(each) for name in each[0]}


class ResidualVectorQuantizer(_Quantizers):
    """A vector as a sum of codes (SoundStream, arXiv 2107.03312 section III.C).

    ``r_1 = z``; stage i finds the code ``q_i`` nearest to ``r_i``; ``r_{i+1} = r_i - q_i``. The output is
    ``z + sg(sum_i q_i - z)``, the loss the sum of the stages' losses. Further indices refine the same vector, so a
    decoder may stop at any of them.

        quantizer = ResidualVectorQuantizer(num_codes=1024, dim=64, num_quantizers=8)
        out = quantizer(z)  # z [..., 64] -> out.quantized [..., 64], out.indices [..., 8]

    Each stage has a copy of a ``transform``.

    Args:
        num_codes: K, or one for each stage.
        dim: D.
        num_quantizers: Q, the number of stages.
        share_stages: one codebook for all stages, which learns from the vectors of all of them in one step; its k-means
            start sees the first stage's vectors only.
        dropout: in training, the share of samples (the first dimension) of which only the first 1 to Q - 1 stages take
            part, so that a decoder learns to do with fewer. The indices of the others are -1.
        eval_beam_size: in eval mode and ``encode``, of how many sums of codes a stage looks on: those of the least
            ``sum_i mean((r_i - q_i)^2)`` over the stages so far. 1, and in training mode: the nearest code only.
        options: of each stage, those of ``FusedVectorQuantizer``. The metric is Euclidean: a residual is no direction.
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        dim: int,
        num_quantizers: int,
        *,
        share_stages: bool = False,
        dropout: float = 0.0,
        eval_beam_size: int = 1,
        **options: Unpack[QuantizerOptions],
    ):
        super().__init__()
        if num_quantizers < 1 or not 0 <= dropout <= 1 or eval_beam_size < 1:
            raise ValueError(
                "num_quantizers and eval_beam_size must be at least 1 and dropout lie in [0, 1]; "
                f"got {num_quantizers}, {eval_beam_size} and {dropout}"
            )
        if options.setdefault("metric", "euclidean") != "euclidean":
            raise ValueError("residual stages compare vectors with their length: metric must be 'euclidean'")
        if options.get("heads", 1) != 1:
            raise ValueError("residual stages have one head each; cut the width before, or use FusedVectorQuantizer")
        sizes = [num_codes] * num_quantizers if isinstance(num_codes, int) else [*num_codes]
        if len(sizes) != num_quantizers or (share_stages and len({*sizes}) > 1):
            wanted = "the same for stages that share" if share_stages else f"one, or {num_quantizers}"
            raise ValueError(f"num_codes must be {wanted}; got {sizes}")
        self.num_quantizers, self.dropout, self.eval_beam_size = num_quantizers, dropout, eval_beam_size
        seed = options.get("seed", 0)
        stages = 1 if share_stages else num_quantizers
        self.stages = nn.ModuleList(
            FusedVectorQuantizer(sizes[i], dim, **(copy.deepcopy(options) | {"seed": seed + i})) for i in range(stages)
        )
        self.stage(0).forwards_per_step = num_quantizers // stages

    def stage(self, i: int) -> FusedVectorQuantizer:
        """The quantizer of stage i."""
        return cast(FusedVectorQuantizer, self.stages[i % len(self.stages)])

    def forward(self, z: Tensor, mask: Tensor | None = None, depth: Tensor | None = None) -> Quantized:
        """As ``FusedVectorQuantizer.forward``; indices have the stages last, [..., Q], and counts first, [Q, K] with
        the largest K, or [1, K] of a codebook that all share. depth: int [B], how many stages each sample takes part
        in; by default as ``dropout`` says."""
        depth = self.draw_depth(z) if depth is None else depth
        residual = _wide(z)
        total = torch.zeros_like(residual)
        beam = None if self.training or self.eval_beam_size == 1 else self._search(z, depth)
        stages = []
        for i in range(self.num_quantizers):
            chosen = None if beam is None else beam[:, i]
            out = self.stage(i)(residual, self._taking_part(z, mask, depth, i), chosen)
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
            self._counts([out.counts for out in stages]),
        )

    def _counts(self, counts: list[Tensor]) -> Tensor:
        if len(self.stages) < self.num_quantizers:
            return torch.stack(counts).sum(0, keepdim=True)  # in training they come with the last stage
        widest = max(map(len, counts))
        return torch.stack([F.pad(c, (0, widest - len(c))) for c in counts])

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors -> indices [..., Q], all stages, and nothing else changes."""
        if self.eval_beam_size > 1:
            stage = self.stage(0)
            keep, found = stage._row_mask(mask, z), self._search(z, None)
            return torch.stack([stage._index_map(part[None], keep, z) for part in found.unbind(-1)], dim=-1)
        residual, indices = _wide(z), []
        for i in range(self.num_quantizers):
            indices.append(self.stage(i).encode(residual, mask))
            residual = residual - self.stage(i).decode(indices[-1])
        return torch.stack(indices, dim=-1)

    @torch.no_grad()
    def _search(self, z: Tensor, depth: Tensor | None) -> Tensor:
        """Indices [N, Q] of the best of ``eval_beam_size`` sums; 0 behind a sample's depth, and of vectors with NaN."""
        rest = self.stage(0)._rows(_wide(z))[0].unsqueeze(1)  # [N, beam, D]
        cost, paths = torch.zeros_like(rest[..., 0]), torch.zeros_like(rest[..., :0], dtype=torch.int64)
        unknown = rest[:, 0].isnan().any(-1, keepdim=True)
        best = torch.zeros(rest.shape[0], self.num_quantizers, dtype=torch.int64, device=z.device)
        for i in range(self.num_quantizers):
            codes, beam = self.stage(i)._codebooks()[0], rest.shape[1]
            k = min(self.eval_beam_size, len(codes))
            found = codebook_search(rest.flatten(0, 1), codes, metric="euclidean", k=k).indices.view(-1, beam, k)
            # One code per beam at a time: all rests at once would be [N, beam, k, D].
            more = [(rest - F.embedding(code, codes)).square().mean(-1) for code in found.unbind(-1)]
            cost = (cost[..., None] + torch.stack(more, dim=-1)).flatten(1)
            cost, kept = cost.topk(min(self.eval_beam_size, beam * k), largest=False)
            found, parent = found.flatten(1).gather(1, kept), (kept // k)[..., None]
            rest = rest.gather(1, parent.expand(-1, -1, rest.shape[-1])) - F.embedding(found, codes)
            paths = torch.cat([paths.gather(1, parent.expand(-1, -1, i)), found[..., None]], dim=-1)
            deep = self._taking_part(z, None, depth, i)
            found = paths[:, 0]
            best[:, : i + 1] = found if deep is None else torch.where(deep.reshape(-1, 1), found, best[:, : i + 1])
        return best.masked_fill(unknown, 0)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices [..., q] of the first q <= Q stages -> the sum of their codes, fp32; index -1 adds nothing."""
        if indices.dim() == 0 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(f"decode: indices must be [..., 1 to {self.num_quantizers}]; got {list(indices.shape)}")
        return torch.stack([self.stage(i).decode(part) for i, part in enumerate(indices.unbind(-1))]).sum(0)

    def draw_depth(self, z: Tensor) -> Tensor | None:
        """How many stages each sample takes part in by ``dropout``, [B]; None: all in all."""
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


class GroupedResidualVectorQuantizer(_Quantizers):
    """The width cut into ``groups`` parts, each with a stack of its own (HiFi-Codec, arXiv 2305.02765 section 3.1).

    A sample takes part in as many stages in one group as in another.

    Args:
        num_codes: K, or one for each stage.
        dim: D, a multiple of groups.
        num_quantizers: Q, the number of stages.
        groups: how many parts.
        share_stages: see ``ResidualVectorQuantizer``.
        dropout: see there.
        eval_beam_size: see there.
        options: of each stage, those of ``FusedVectorQuantizer``.
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        dim: int,
        num_quantizers: int,
        groups: int,
        *,
        share_stages: bool = False,
        dropout: float = 0.0,
        eval_beam_size: int = 1,
        **options: Unpack[QuantizerOptions],
    ):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"dim must be a multiple of groups; got dim={dim}, groups={groups}")
        seed = options.get("seed", 0)
        of_each: dict[str, Any] = {"share_stages": share_stages, "dropout": dropout, "eval_beam_size": eval_beam_size}
        of_each |= options
        seeds = [seed + g * num_quantizers for g in range(groups)]
        self.stacks = nn.ModuleList(
            ResidualVectorQuantizer(num_codes, dim // groups, num_quantizers, **(copy.deepcopy(of_each) | {"seed": s}))
            for s in seeds
        )

    def _stacks(self) -> list[ResidualVectorQuantizer]:
        return [cast(ResidualVectorQuantizer, stack) for stack in self.stacks]

    def forward(self, z: Tensor, mask: Tensor | None = None, depth: Tensor | None = None) -> Quantized:
        """As ``ResidualVectorQuantizer.forward``: indices [..., groups, Q], counts [groups, Q, K], loss the mean."""
        depth = self._stacks()[0].draw_depth(z) if depth is None else depth
        parts = [stack(part, mask, depth) for stack, part in zip(self._stacks(), self._parts(z), strict=True)]
        return Quantized(
            torch.cat([part.quantized for part in parts], dim=self._axis(z)),
            torch.stack([part.indices for part in parts], dim=-2),
            torch.stack([part.loss for part in parts]).mean(),
            torch.stack([part.counts for part in parts]),
        )

    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors -> indices [..., groups, Q], and nothing else changes."""
        pairs = zip(self._stacks(), self._parts(z), strict=True)
        return torch.stack([stack.encode(part, mask) for stack, part in pairs], dim=-2)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices [..., groups, q] of the first q <= Q stages -> the vectors, fp32; index -1 adds nothing."""
        if indices.dim() < 2 or indices.shape[-2] != len(self.stacks):
            raise ValueError(f"decode: indices must be [..., {len(self.stacks)}, stages]; got {list(indices.shape)}")
        parts = [stack.decode(part) for stack, part in zip(self._stacks(), indices.unbind(-2), strict=True)]
        return torch.cat(parts, dim=self._axis(parts[0]))

    def _axis(self, z: Tensor) -> int:
        return self._stacks()[0].stage(0).channel_axis(z)

    def _parts(self, z: Tensor) -> Sequence[Tensor]:
        width = sum(stack.stage(0).dim for stack in self._stacks())
        if z.dim() == 0 or z.shape[self._axis(z)] != width:
            raise ValueError(f"expected vectors of width {width}; got {list(z.shape)}")
        return z.chunk(len(self.stacks), dim=self._axis(z))


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
