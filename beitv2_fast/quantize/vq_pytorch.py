"""The fused quantizer behind the signatures of vector-quantize-pytorch's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search, vector_quantize
from ..kernels.codebook_update.ops import ema_step, sum_over_ranks
from ..kernels.sampling import ALONE, world
from ..kernels.snapshot import copy_codebook, recomputing
from .adapters import refuse, refuse_hidden
from .options import QuantizerOptions
from .quantizer import FusedVectorQuantizer, Quantized
from .soft import code_cross_entropy, diversity_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of each code, [K] or [heads, K]: a number, a tensor, or a function of the batch's sums [..., K, D] and counts.
Weight = float | Tensor | Callable[[Tensor, Tensor], Tensor]


class VectorQuantizeAdapter(FusedVectorQuantizer):
    """For VectorQuantize of vector-quantize-pytorch, cosine and Euclidean, learned by EMA or by gradient, or frozen.

    docs/quantizer_compatibility.md lists the options that are kept. Different: a masked cosine quantizer's commitment
    loss compares unit vectors, as its unmasked one does; the diversity and cross-entropy losses have the gradient of
    the codes that were searched, not of those that the EMA made of them since; with a mask the codes of padding are not
    among the active ones of the orthogonal regularization; the codes of indices are those of ``forward``, so behind a
    vq_bridge; k-means waits for the first batch in training mode; a vector shorter than 1e-6 passes the rotation
    straight through; losses of no vectors are 0.
    """

    any_length = True

    def __init__(self, module: Any, **options: Unpack[QuantizerOptions]):
        refuse_hidden(module, "forward")
        book = module._codebook
        stochastic = getattr(book.gumbel_sample, "keywords", {}).get("stochastic", False)
        optimizer, learnable = module.in_place_codebook_optimizer, module.learnable_codebook
        bridged, restarts = book.vq_bridge is not None, book.has_dead_code_replacement
        diversity = module.codebook_diversity_loss_weight, module.codebook_diversity_temperature
        refuse(
            {
                "stochastic_sample_codes with in_place_codebook_optimizer": stochastic and optimizer,
                "directional_reparam": module.directional_reparam,
                "in_place_codebook_optimizer without learnable_codebook": optimizer and not learnable,
                "affine_param": book.affine_param,
                "threshold_ema_dead_code with vq_bridge": bridged and restarts,
                "kmeans_init with vq_bridge": bridged and not book.initted,
                "ema_update=False with threshold_ema_dead_code": not (book.ema_update or learnable) and restarts,
                "sync_kmeans=False": book.use_ddp and book.kmeans_all_reduce_fn is not dist.all_reduce,
                "codebook_diversity_temperature of 0 or less": diversity[0] > 0 and not diversity[1] > 0,
            }
        )
        commitment = max(float(module.commitment_weight), 0.0)
        kept: dict[str, Any] = {
            "metric": "cosine" if module.use_cosine_sim else "euclidean",
            "learning": "gradient" if learnable else "sum_ema" if book.ema_update else "frozen",
            "transform": book.vq_bridge,
            "decay": book.decay,
            "eps": book.eps,
            "commitment_weight": commitment,
            "codebook_weight": commitment,
            "gradient": "rotation" if module.rotation_trick else "straight_through",
            "temperature": max(float(book.sample_codebook_temp), 0.0) if stochastic else 0.0,
            "heads": module.heads,
            "share_codebook": not module.separate_codebook_per_head,
            "kmeans_init": not bool(book.initted),
            "kmeans_iterations": max(book.kmeans_iters, 1),
            "dead_after": 0.0,
            "dead_below": max(float(book.threshold_ema_dead_code), 0.0),
            "track_eval_usage": False,
            "sync": bool(book.use_ddp) or world()[1] == 1,
        }
        super().__init__(module.codebook_size, book.embed.shape[-1] * module.heads, **{**kept, **options})
        if isinstance(book.embed, nn.Parameter) and self.learning != "gradient":  # for the orthogonal regularization
            start = self.codebook
            del self.codebook
            self.codebook = nn.Parameter(start)
        self.project_in, self.project_out = module.project_in, module.project_out
        self.codebook_size, self.sync_update_v = module.codebook_size, module.sync_update_v
        self.channels_first = not module.channel_last or module.accept_image_fmap or module.accept_3d_fmap
        self.zeros_for_padding = module.return_zeros_for_masked_padding
        self.manual_ema_update: bool = book.manual_ema_update
        self.ema_update_weight: Weight | None = None
        self.stochastic = stochastic
        self.routes_gradients = module.route_gradients_to_input
        self.diversity, self.orthogonal = diversity, module.orthogonal_reg_weight
        self.orthogonal_of = module.orthogonal_reg_active_codes_only, module.orthogonal_reg_max_codes
        self.by_cross_entropy = module.commitment_use_cross_entropy_loss
        self.breakdown = sys.modules[type(module).__module__].LossBreakdown
        self.to(book.embed.device)
        with torch.no_grad():
            self.codebook.copy_(book.embed.view_as(self.codebook))
            self.cluster_size.copy_(book.cluster_size.view_as(self.cluster_size))
            if self.embed_avg is not None:
                self.embed_avg.copy_(book.embed_avg.view_as(self.embed_avg))
        self.in_place_codebook_optimizer = None if optimizer is None else _moved(optimizer, book.embed, self.codebook)
        self.manual_in_place_optimizer_update = module.manual_in_place_optimizer_update
        if module.freeze_codebook:
            self.freeze()

    def forward(  # type: ignore[override]  # as the original's
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        topk: int | None = None,  # as ResidualVQ's beams ask: quantized [..., k, D], indices and loss [..., k]
        sample_codebook_temp: float | None = None,  # of no effect where codes are not drawn
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        ema_update_weight: Weight | None = None,
        accum_ema_update: bool = False,
        **unsupported: Any,
    ) -> tuple[Tensor, ...]:
        refuse({name: value is not None for name, value in unsupported.items()})
        refuse({"accum_ema_update": accum_ema_update, "lens beside mask": lens is not None and mask is not None})
        if lens is not None:
            mask = torch.arange(x.shape[1], device=x.device) < lens[:, None]
        last = x.movedim(1, -1) if self.channels_first and x.dim() > 2 else x
        kept = self.frozen, self.gradient, None, self.temperature
        self.frozen = self.frozen if freeze_codebook is None else freeze_codebook
        self.ema_update_weight = ema_update_weight
        if self.stochastic and sample_codebook_temp is not None:
            self.temperature = max(float(sample_codebook_temp), 0.0)
        # As in the original the codes themselves come out, with their own gradient, where the input gets none.
        if not (self.training and self.routes_gradients and x.requires_grad):
            self.gradient = "codes"
        try:
            inside = self.project_in(last)
            if topk is not None:
                quantized, few, costs = self._nearest_few(last, inside, mask, topk)
                return quantized if last is x else quantized.movedim(-1, 1), few, costs
            in_place = self._step_in_place(inside, mask)
            codes: Any = None
            if indices is not None or (self.training and (self.by_cross_entropy or self.diversity[0] > 0)):
                if self.training:
                    self.start(inside, mask)
                codes = self._codebooks().clone()  # as they are searched, before they learn
            out = super().forward(inside, mask)
            losses = self._losses(out, in_place, inside, codes)
        finally:
            self.frozen, self.gradient, self.ema_update_weight, self.temperature = kept
        if indices is not None:
            return self._outside(out.quantized, None, last), self._cross_entropy(inside, codes, indices)
        quantized = self._outside(out.quantized, mask, last)
        if last is not x:
            quantized = quantized.movedim(-1, 1)
        weights = self.breakdown(self.commitment_weight, self.diversity[0], self.orthogonal, 0.0)
        loss: Any = sum(weight * part for weight, part in zip(weights, losses, strict=True))
        if self.training and not (loss.requires_grad or torch.compiler.is_compiling()):
            loss.requires_grad_()  # also of vectors and codes that need no gradient, as the original's
        breakdown: Any = [losses] if return_loss_breakdown else []
        return quantized, out.indices, loss, *breakdown

    def _nearest_few(self, z: Tensor, inside: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, ...]:
        """The k nearest codes of every vector and what each would cost; the codebook learns in ``update_indices``."""
        more = self.stochastic or self.by_cross_entropy or max(self.diversity[0], self.orthogonal) > 0
        more = self.training and (more or self.in_place_codebook_optimizer is not None)
        beside = "topk in training with stochastic codes, an optimizer in place or losses beside commitment"
        refuse({"topk with heads": self.heads > 1, beside: more})
        k, shape = min(k, self.num_codes), z.shape[:-1]
        keep = None if mask is None else mask.view(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)
        x = self._in_turn(inside)
        if self.training:
            self.start(inside, keep)
        codes = self._codebooks()[0]
        indices = codebook_search(x, codes, metric=self.metric, k=k).indices.flatten()
        with torch.autocast(z.device.type, enabled=False):
            rows = x.repeat_interleave(k, dim=0)
            quantized = self._quantize(rows, codes, None, indices)[0]
            chosen = F.embedding(indices, codes if self._rule == "gradient" else codes.detach())
            compared = F.normalize(rows.float(), dim=-1) if self.metric == "cosine" else rows
            loss = (chosen - compared).square().mean(-1).view(*shape, k) * (self.commitment_weight or not self.training)
        quantized, indices = quantized.to(z.dtype).view(*shape, k, self.dim), indices.view(*shape, k)
        if keep is not None:
            keep = keep.unsqueeze(-1)
            indices, loss = torch.where(keep, indices, -1), torch.where(keep, loss, 0.0)
        return self._outside(quantized, keep, z.unsqueeze(-2)), indices, loss

    def _outside(self, quantized: Tensor, mask: Tensor | None, z: Tensor) -> Tensor:
        """What comes out for what was found inside, [..., D], for vectors z."""
        if self.training and self.sync_update_v:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        quantized = self.project_out(quantized)
        if mask is None:
            return quantized
        return torch.where(mask[..., None], quantized, 0.0 if self.zeros_for_padding else z)

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Learn from vectors and the codes that a beam search chose for them."""
        rows = self._in_turn(self.project_in(x))
        keep = None if mask is None else mask.reshape(-1)
        self._learn(self._seen(rows, keep), indices.reshape(-1).clamp(min=0), keep)

    def _losses(self, out: Quantized, in_place: Tensor, z: Tensor, codes: Any) -> tuple[Tensor, ...]:
        """LossBreakdown, without weights; all zero in eval mode."""
        commitment = diversity = orthogonal = torch.zeros_like(out.loss)
        weight, own = self.commitment_weight, self.codebook_weight if self._rule == "gradient" else 0.0
        if self.training and weight and self.by_cross_entropy:
            commitment = self._cross_entropy(z, codes, out.indices)
        elif self.training and weight:
            # The original counts the distance once, and both vectors and codes get its gradient.
            commitment = (out.loss - out.loss.detach() * (own / (weight + own))) / weight
        if self.training and self.diversity[0] > 0:
            # [G, N, D] -> [places, G, batch and heads, D]
            batch, places = z.shape[:-1][:1].numel(), z.shape[1:-1].numel()
            rows = self._rows(z).unflatten(1, (batch, places, self.heads // self.groups))
            rows = rows.permute(2, 0, 1, 3, 4).flatten(2, 3)
            options = {"metric": self.metric, "temperature": 1 / self.diversity[1]}
            diversity = diversity_loss(rows, codes, **options)
        if self.training and self.orthogonal > 0:
            orthogonal = self._orthogonal_loss(out.indices)
        losses: tuple[Tensor, ...] = self.breakdown(commitment, diversity, orthogonal, in_place.to(out.loss))
        return losses

    def _cross_entropy(self, z: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        """Of the softmax of similarities to the ``codes`` [G, K, D], to indices as ``forward`` returns them."""
        wanted = indices.reshape(-1, self.groups, self.heads // self.groups).transpose(0, 1).flatten(1)
        triples = zip(self._rows(z), codes, wanted, strict=True)
        losses = [code_cross_entropy(x, book, of, metric=self.metric) for x, book, of in triples]
        return torch.stack(losses).mean()

    def _orthogonal_loss(self, indices: Tensor) -> Tensor:
        """Eq. 2 of arXiv 2112.00384 over the codes, those of the batch, or at most so many drawn at random."""
        active, most = self.orthogonal_of
        codes = self._codebook.embed
        codes = copy_codebook(codes, codes.detach())
        if active:
            codes = codes[:, indices[indices >= 0].unique()]
        if most is not None and codes.shape[1] > most:
            codes = codes[:, torch.randperm(codes.shape[1], device=codes.device)[:most]]
        heads, count = codes.shape[:2]
        unit = F.normalize(codes, dim=-1, eps=1e-6)
        # The squares of [K, K] products add up to those of the [D, D] ones. A code of zeros stays one, so misses its 1.
        squares = (unit.mT @ unit).square().sum() - 2 * unit.square().sum()
        loss: Tensor = (squares / heads + count) / max(count, 1) ** 2
        return loss

    def _step_in_place(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """A step of in_place_codebook_optimizer on ``mean((v - sg(z))^2)``, which is returned."""
        optimizer = self.in_place_codebook_optimizer
        if optimizer is None or not self.training or self.frozen or recomputing():
            return torch.zeros((), device=z.device)
        x, keep = self._in_turn(z.detach()), self._row_mask(mask, z)
        self._start(self._seen(x, keep))
        options: dict[str, Any] = {"metric": self.metric, "commitment_weight": 0.0, "codebook_weight": 1.0}
        with torch.autocast(z.device.type, enabled=False):
            rows = x if keep is None else x[keep]
            loss = vector_quantize(rows, self._codebooks(), **options).loss
            loss.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss.detach()

    def update_in_place_optimizer(self) -> None:
        """Its step, by the mean of the ranks' gradients: for manual_in_place_optimizer_update."""
        optimizer = self.in_place_codebook_optimizer
        if optimizer is None:
            return
        ranks = world(self._group)[1]
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            sum_over_ranks(parameter.grad, self._group)
            parameter.grad /= ranks
        optimizer.step()
        optimizer.zero_grad()

    def _move_codebooks(self, seen: Tensor, indices: Tensor) -> Tensor:
        """With weights the averages of each code move by ``(1 - decay) weight``; a manual update keeps the codes."""
        weight = self.ema_update_weight
        if self.embed_avg is None or (weight is None and not self.manual_ema_update):
            return super()._move_codebooks(seen, indices)
        codes = self.codebook.new_zeros(self.groups, self.num_codes, self.code_dim)
        cluster_size, embed_avg = self.cluster_size.view(codes.shape[:2]), self.embed_avg.view(codes.shape)
        sizes, sums = torch.zeros_like(cluster_size), torch.zeros_like(embed_avg)
        # A step of decay 0 has the batch's own averages.
        bins = ema_step(codes, sizes, sums, seen, indices, 0.0, self.metric, self.eps, self._group)
        weight = weight(sums, sizes) if callable(weight) else 1.0 if weight is None else weight
        step = (1 - self.decay) * weight * torch.ones_like(sizes)
        cluster_size.lerp_(sizes, step)
        embed_avg.lerp_(sums, step[..., None])
        if not self.manual_ema_update:
            self.update_ema()
        return bins.view(self.idle.shape)

    @torch.no_grad()
    def update_ema(self) -> None:
        """The codes become those of the moving averages: for manual_ema_update."""
        none = self.codebook.new_empty(0, self.code_dim), self.idle.new_empty(0)
        moved = self.codebook, self.cluster_size, self.embed_avg
        ema_step(*moved, *none, 1.0, self.metric, self.eps, ALONE)  # decay 1: averages stay

    def expire_codes_(self, x: Tensor) -> None:
        """Nothing: dead codes restart in ``forward``."""

    @property
    def freeze_codebook(self) -> bool:
        """As the original's attribute, which may be set."""
        return self.frozen

    @freeze_codebook.setter
    def freeze_codebook(self, frozen: bool) -> None:
        self.freeze(frozen)

    @property
    def _codebook(self) -> SimpleNamespace:
        """What ResidualVQ reads: embed [codebooks, K, D]; and what it calls."""
        embed = self.codebook.unsqueeze(0) if self.groups == 1 else self.codebook
        return SimpleNamespace(embed=embed, update_ema=self.update_ema)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices, those of several heads side by side."""
        return self._outward(self.decode(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned with these indices."""
        return self._outward(self.project_out(self.decode(indices)))

    def _outward(self, codes: Tensor) -> Tensor:
        return codes.movedim(-1, 1) if self.channels_first and codes.dim() > 2 else codes


def _moved(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> torch.optim.Optimizer:
    """A copy of the optimizer that has ``new`` in the place of ``old``, with its moments."""
    same = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    moved = copy.deepcopy(optimizer, {**same, id(old): new})
    moments = moved.state[new]
    moved.state[new] = {name: t.view_as(new) if t.shape == old.shape else t for name, t in moments.items()}
    return moved
