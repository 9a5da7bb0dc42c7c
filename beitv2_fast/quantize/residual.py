"""A stack of quantizers, each of which quantizes what the ones before it left, by itself and in groups of the width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search
from ..kernels.codebook_search.reference import look_up
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
            With ``heads`` every part of the width has a stack, and beams, of its own.
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
        """As ``FusedVectorQuantizer.forward``; indices have the stages last, [..., Q] or [..., heads, Q], and counts
        before the codes, [..., Q, K] with the largest K, or [..., 1, K] of a codebook that all stages share. depth:
        int [B], or [] for z [D], how many stages each sample takes part in; by default as ``dropout`` says.

        Raises:
            As ``FusedVectorQuantizer.forward``; ValueError: a depth that is not [B].
        """
        if depth is None:
            depth = self.draw_depth(z)
        elif not isinstance(depth, Tensor) or depth.shape != _samples(z):
            got = list(depth.shape) if isinstance(depth, Tensor) else repr(depth)
            raise ValueError(f"depth must be a tensor {list(_samples(z))}, stages for each sample; got {got}")
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
            return torch.stack(counts, dim=-2).sum(-2, keepdim=True)  # in training they come with the last stage
        widest = max(c.shape[-1] for c in counts)
        return torch.stack([F.pad(c, (0, widest - c.shape[-1])) for c in counts], dim=-2)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors -> indices [..., Q], all stages, and nothing else changes."""
        if self.eval_beam_size > 1:
            stage = self.stage(0)
            keep, found = stage._row_mask(mask, z), self._search(z, None)
            return torch.stack([stage._index_map(part, keep, z) for part in found.unbind(-1)], dim=-1)
        residual, indices = _wide(z), []
        for i in range(self.num_quantizers):
            indices.append(self.stage(i).encode(residual, mask))
            residual = residual - self.stage(i).decode(indices[-1])
        return torch.stack(indices, dim=-1)

    @torch.no_grad()
    def _search(self, z: Tensor, depth: Tensor | None) -> Tensor:
        """Indices [N G, Q], of the codebooks in turn, of the best of ``eval_beam_size`` sums; 0 behind a sample's
        depth, and of vectors with NaN."""
        rest = self.stage(0)._in_turn(_wide(z)).unsqueeze(1)  # [N G, beam, D]
        cost, paths = torch.zeros_like(rest[..., 0]), torch.zeros_like(rest[..., :0], dtype=torch.int64)
        unknown = rest[:, 0].isnan().any(-1, keepdim=True)
        best = torch.zeros(rest.shape[0], self.num_quantizers, dtype=torch.int64, device=z.device)
        for i in range(self.num_quantizers):
            codes, (rows, beam, dim) = self.stage(i)._searched(), rest.shape
            k = min(self.eval_beam_size, codes.shape[-2])
            in_turn = rest.transpose(0, 1).flatten(0, 1)
            found = codebook_search(in_turn, codes, metric="euclidean", k=k).indices.view(beam, rows, k).transpose(0, 1)
            # One code per beam at a time: all rests at once would be [N G, beam, k, D].
            more = [(rest - look_up(codes, code)).square().mean(-1) for code in found.unbind(-1)]
            cost = (cost[..., None] + torch.stack(more, dim=-1)).flatten(1)
            cost, kept = cost.topk(min(self.eval_beam_size, beam * k), largest=False)
            found, parent = found.flatten(1).gather(1, kept), (kept // k)[..., None]
            rest = rest.gather(1, parent.expand(-1, -1, dim)) - look_up(codes, found)
            paths = torch.cat([paths.gather(1, parent.expand(-1, -1, i)), found[..., None]], dim=-1)
            deep = self.stage(i)._row_mask(self._taking_part(z, None, depth, i), z)
            found = paths[:, 0]
            best[:, : i + 1] = found if deep is None else torch.where(deep[:, None], found, best[:, : i + 1])
        return best.masked_fill(unknown, 0)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices [..., q] of the first q <= Q stages -> the sum of their codes, fp32; index -1 adds nothing."""
        if indices.dim() == 0 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(f"decode: indices must be [..., 1 to {self.num_quantizers}]; got {list(indices.shape)}")
        return torch.stack([self.stage(i).decode(part) for i, part in enumerate(indices.unbind(-1))]).sum(0)

    def freeze(self, frozen: bool = True) -> None:
        """Keep all codebooks as they are until ``thaw``: see ``FusedVectorQuantizer.freeze``."""
        for i in range(len(self.stages)):
            self.stage(i).freeze(frozen)

    def thaw(self) -> None:
        """Let all codebooks learn again."""
        self.freeze(False)

    def usage(self, reset: bool = False) -> dict[str, float]:
        """Means over the stages of their ``usage``."""
        stages = [self.stage(i).usage(reset) for i in range(len(self.stages))]
        return {name: sum(stage[name] for stage in stages) / len(stages) for name in stages[0]}

    def draw_depth(self, z: Tensor) -> Tensor | None:
        """How many stages each sample takes part in by ``dropout``, [B]; None: all in all."""
        if not self.training or not self.dropout or self.num_quantizers == 1:
            return None
        depth = torch.randint(1, self.num_quantizers, _samples(z), device=z.device)
        return torch.where(torch.rand(depth.shape, device=z.device) < self.dropout, depth, self.num_quantizers)

    def _taking_part(self, z: Tensor, mask: Tensor | None, depth: Tensor | None, i: int) -> Tensor | None:
        """The mask of stage i."""
        if depth is None:
            return mask
        shape = z.select(self.stage(0).channel_axis(z), 0).shape
        deep = (depth > i).view((*depth.shape, *[1] * (len(shape) - depth.dim()))).expand(shape)
        return deep if mask is None else deep & mask


class GroupedResidualVectorQuantizer(ResidualVectorQuantizer):
    """The width cut into ``groups`` parts, each with a stack of its own (HiFi-Codec, arXiv 2305.02765 section 3.1).

    A ResidualVectorQuantizer of as many ``heads``. Indices are [..., groups, Q], with one group [..., Q]; counts are
    [groups, Q, K], with one codebook for all groups [Q, K]; the loss is the mean of the groups' losses. A sample takes
    part in as many stages in one group as in another.

    Args:
        num_codes: as of ``ResidualVectorQuantizer``.
        dim: D, a multiple of ``groups``.
        num_quantizers: Q.
        groups: how many parts.
        options: all others of ``ResidualVectorQuantizer``.
    """

    def __init__(self, num_codes: int | Sequence[int], dim: int, num_quantizers: int, groups: int, **options: Any):
        super().__init__(num_codes, dim, num_quantizers, heads=groups, **options)


def _wide(z: Tensor) -> Tensor:
    """Half precision in fp32; what no quantizer takes is left for the stages to refuse."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _samples(z: Tensor) -> torch.Size:
    """[B], or [] of a single vector [D]."""
    return z.shape[:-1][:1]
