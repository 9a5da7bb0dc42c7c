"""FusedVectorQuantizer: a vector quantizer on the ops of ``beitv2_fast.kernels`` that drops into other projects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .dead_codes import replace_dead_codes, start_codebook
from .kernels import codebook_search, codebook_update, vector_quantize
from .kernels.sampling import world
from .layout import Layout
from .options import QuantizerOptions
from .published import fit_options, rename_published
from .quantized import Quantized, perplexity
from .rotation import EPS as ROTATION_EPS
from .rotation import rotate_to


class FusedVectorQuantizer(nn.Module):
    """A layer that replaces vectors by codes of a codebook that it learns.

    By default the quantizer of BEiT v2 (arXiv 2208.06366 section 2.2): l2-normalised vectors, cosine search, codebook
    moved by EMA, k-means on the first batch. Dead codes restart, which the reference's do not: ``dead_after=0`` is
    exact parity with it. Options: see ``QuantizerOptions``; all of them are keyword arguments.

        quantizer = FusedVectorQuantizer(num_codes=8192, dim=32)
        out = quantizer(z)  # z [..., 32] -> out.quantized, out.indices, out.loss, out.counts, out.perplexity

    With ``y = l2(z)`` (cosine) or ``y = z`` (euclidean) and code ``v`` nearest to ``y``: ``quantized = y + sg(v - y)``,
    ``loss = commitment_weight mean((sg(v) - y)^2)``, and with a codebook learnt by gradient
    ``+ codebook_weight mean((v - sg(y))^2)``.

    State (float buffers stay fp32 whatever ``.to(dtype)`` says): ``codebook`` [K, D], or [heads, K, D] with separate
    codebooks; ``cluster_size`` [K], EMA of how often each code is chosen (for the learning rules that do not need it
    also updated in eval mode, as the reference does for its usage reports); ``embed_avg`` with sum_ema; ``initialized``
    bool; ``idle`` [K] int64, vectors seen since a code was last chosen; ``steps`` int64. All of it holds the same bits
    on every rank: statistics are summed over the default process group, in eval mode too (see ``track_eval_usage``).
    """

    frozen = False  # by freeze(); an attribute like ``training`` and ``requires_grad``, so no part of a state dict

    def __init__(self, num_codes: int, dim: int, **options: Any):
        super().__init__()
        self.options = o = QuantizerOptions(**options)
        o.check(num_codes, dim)
        self.num_codes, self.dim = num_codes, dim
        self.code_dim = dim // o.heads
        self.groups = 1 if o.share_codebook else o.heads  # codebooks
        self.layout = Layout(dim, o.heads, self.groups, o.channel_last)
        shape = (num_codes,) if self.groups == 1 else (self.groups, num_codes)
        start = torch.randn(*shape, self.code_dim, generator=torch.Generator().manual_seed(o.seed))
        codebook = F.normalize(start, dim=-1) if o.metric == "cosine" else start
        if o.learns_by == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        sums = o.learns_by == "sum_ema"
        self.register_buffer("cluster_size", torch.ones(shape) if sums else torch.zeros(shape))
        self.register_buffer("initialized", torch.tensor(not o.kmeans_init))
        self.register_buffer("idle", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Absent ones are no buffers of None: torch.export of a root module mistakes what follows those.
        if sums:
            self.register_buffer("embed_avg", codebook.clone())
        else:
            self.embed_avg = None
        if o.restart_below:
            self.register_buffer("recent", torch.zeros(shape, dtype=torch.int64))
        else:
            self.recent = None
        # For the logs, no part of a checkpoint: how often each code was chosen, and how many restarted, in the window.
        self.register_buffer("window_counts", torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.register_buffer("window_replaced", torch.zeros((), dtype=torch.int64), persistent=False)
        # (initialized, steps) on the CPU, which spares the host a look at the device in every step; 0: look first.
        self._clock = torch.zeros(2, dtype=torch.int64, device="cpu")
        # Gradient accumulation: so many training forwards make one step, and the codebook moves in the last of them.
        self.forwards_per_step = 1
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.frozen else ""
        return f"num_codes={self.num_codes}, dim={self.dim}, {self.options.changed()}{frozen}"

    def freeze(self) -> None:
        """Keep the codebook as it is in training mode, too, until ``thaw``.

        As with ``learning="frozen"`` the gradient and the commitment loss still reach the vectors, and a codebook that
        was not started yet still starts by k-means. Beside ``usage()`` nothing else changes in training mode. A
        codebook that learns by gradient gets none, and the loss has no term for it; its ``requires_grad`` is off.
        A state dict does not say whether it is frozen; copies and pickles do.
        """
        self._set_frozen(True)

    def thaw(self) -> None:
        """Let the codebook learn again by its rule, from the state in which ``freeze`` found it."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        if isinstance(self.codebook, nn.Parameter):
            self.codebook.requires_grad_(not frozen)
            self.codebook.grad = None  # an optimiser would move it by an old gradient

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize vectors; in training mode also move the codebook.

        Args:
            z: [..., dim], or [B, dim, ...] with ``channel_last=False``, e.g. image maps [B, C, H, W]. Any float dtype.
            mask: bool, the shape of z without the channels: True for the vectors that count. The others influence
                nothing and come out as zeros with index -1.

        Raises:
            ValueError: z or mask of another shape. TypeError: z or mask of another dtype.
        """
        with torch.autocast(z.device.type, enabled=False):
            x = self.layout.rows(z)  # [G, N, D]
            keep = None if mask is None else self.layout.row_mask(mask, z)
            if keep is not None:
                x = torch.where(keep[:, None], x, 1.0)  # padding may hold NaN, and zeros have no direction
            # The update leaves out vectors of NaN: that is how it is told which ones do not count.
            seen = x.detach() if keep is None else x.detach().masked_fill(~keep[:, None], torch.nan)
            if self.training:
                self._start(seen)
            parts = [self._quantize(x[g], g, keep) for g in self._each()]
            quantized, indices, losses = (_stack(part) for part in zip(*parts, strict=True))  # [G, N, D], [G, N], [G]
            counts = self._learn_when_due(seen, indices, keep)
            loss = losses.mean()
            quantized = self.layout.unrows(quantized, z)
        if mask is not None:
            indices = torch.where(keep, indices, -1)
        return Quantized(quantized, self.layout.unrow_indices(indices, z), loss, counts)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """k-means on these vectors [..., dim], if it is due: where several forwards make the first step."""
        self._start(self.layout.rows(z).detach())

    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors -> indices as in ``forward``, and nothing else changes."""
        with torch.autocast(z.device.type, enabled=False):
            x = self.layout.rows(z)
            indices = [self._nearest(x[g], self._codes(g)) for g in self._each()]
        indices = _stack(indices)
        if mask is not None:
            indices = torch.where(self.layout.row_mask(mask, z), indices, -1)
        return self.layout.unrow_indices(indices, z)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them -> the vectors that it returned, fp32; index -1 gives zeros.

        Raises:
            ValueError: with several heads, a last dimension that is not ``heads``. TypeError: no integers.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"decode: indices must be integers; got {indices.dtype}")
        indices = indices.long()  # uint16 of a file of codes knows no arithmetic
        heads = self.options.heads
        if heads > 1 and (indices.dim() == 0 or indices.shape[-1] != heads):
            raise ValueError(f"decode: indices must be [..., {heads}], one for each head; got {list(indices.shape)}")
        chosen = indices.clamp(min=0)
        if self.groups == 1:
            codes = F.embedding(chosen, self._codes(0))
        else:
            codes = torch.stack([F.embedding(chosen[..., g], self._codes(g)) for g in self._each()], dim=-2)
        codes = torch.where((indices >= 0)[..., None], codes, 0.0)
        if heads > 1:
            codes = codes.flatten(-2)
        return codes if self.options.channel_last or codes.dim() < 2 else codes.movedim(-1, 1)

    @torch.no_grad()
    def usage(self, reset: bool = False) -> dict[str, float]:
        """Since the last reset: share of codes chosen, perplexity of their frequencies, how many dead codes restarted.

        Share and perplexity are means over the codebooks.
        """
        result = {
            "used_codes": (self.window_counts > 0).double().mean().item(),
            "perplexity": perplexity(self.window_counts).mean().item(),
            "replaced_codes": float(self.window_replaced),
        }
        if reset:
            self.window_counts.zero_()
            self.window_replaced.zero_()
        return result

    @torch.no_grad()
    def reset_cluster_size(self) -> None:
        """Forget the usage statistics, as the reference does at the start of every epoch and before evaluation."""
        if self.embed_avg is not None:
            raise RuntimeError("with learning='sum_ema' the codes are embed_avg / cluster_size: it cannot be forgotten")
        self.cluster_size.zero_()

    def _each(self) -> range:
        return range(self.groups)

    def _codes(self, g: int) -> Tensor:
        """Codebook g as it is searched, [K, D]; differentiable when it learns by gradient."""
        codes = self.codebook if self.groups == 1 else self.codebook[g]
        if self.options.learns_by != "gradient":
            return codes
        codes = codes.clone().float()  # a copy, since backward may need it after a dead code was replaced in place
        return F.normalize(codes, dim=-1) if self.options.metric == "cosine" else codes

    @property
    def has_unit_codes(self) -> bool:
        """Whether the codebook itself holds unit vectors: with cosine, but a learnt parameter is normalised at use."""
        return self.options.metric == "cosine" and self.options.learns_by != "gradient"

    @property
    def _rule(self) -> str:
        return "frozen" if self.frozen else self.options.learns_by

    def _nearest(self, x: Tensor, codes: Tensor) -> Tensor:
        """Indices [N] of the codes [K, D] for x [N, D]."""
        return codebook_search(x, codes, metric=self.options.metric).indices

    def _quantize(self, x: Tensor, g: int, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One codebook: x [N, D] -> (quantized [N, D], indices [N], loss)."""
        o = self.options
        codebook = self._codes(g)
        codebook_weight = o.codebook_weight if self._rule == "gradient" else 0.0
        if keep is None and o.gradient == "straight_through":
            fused = vector_quantize(
                x,
                codebook,
                metric=o.metric,
                commitment_weight=o.commitment_weight,
                codebook_weight=codebook_weight,
            )
            return fused.quantized, fused.indices, fused.loss
        shortest = max(ROTATION_EPS, torch.finfo(x.dtype).smallest_normal)  # of fp16, 6e-5: below, few bits are left
        x = x if x.dtype == torch.float64 else x.float()
        y = F.normalize(x, dim=-1) if o.metric == "cosine" else x
        indices = self._nearest(x, codebook)
        codes = F.embedding(indices, codebook).to(y.dtype)
        loss = o.commitment_weight * _mean_square(codes.detach() - y, keep)
        if codebook_weight:
            loss = loss + codebook_weight * _mean_square(codes - y.detach(), keep)
        codes = codes.detach()
        quantized = rotate_to(y, codes, shortest) if o.gradient == "rotation" else y + (codes - y).detach()
        return quantized if keep is None else torch.where(keep[:, None], quantized, 0.0), indices, loss

    def _learn_when_due(self, seen: Tensor, indices: Tensor, keep: Tensor | None) -> Tensor:
        """``_learn`` from all vectors of a step at its last forward; the counts are zeros until then."""
        if not self.training or self.forwards_per_step == 1:
            return self._learn(seen, indices, keep)
        self._waiting.append((seen, indices, keep))
        if len(self._waiting) < self.forwards_per_step:
            return torch.zeros_like(self.window_counts)
        everything, self._waiting = self._waiting, []
        if all(kept is None for _, _, kept in everything):
            keep = None
        else:
            keep = torch.cat([i.new_ones(i.shape[-1], dtype=torch.bool) if k is None else k for _, i, k in everything])
        seen, indices = (torch.cat(parts, dim=1) for parts in list(zip(*everything, strict=True))[:2])
        return self._learn(seen, indices, keep)

    def _learn(self, seen: Tensor, indices: Tensor, keep: Tensor | None) -> Tensor:
        """Move the codebook and keep the statistics; returns how often each code was chosen, over all ranks.

        Nothing here has a gradient. Hence no no_grad(), which torch.export would make a region that it cannot save.
        """
        o = self.options
        state, tracked = self._state(), self.training or o.track_eval_usage
        if self.training and self._rule in ("code_ema", "sum_ema"):
            counts = []
            for g in self._each():
                average = state["embed_avg"][g] if self.embed_avg is not None else None
                counts.append(
                    codebook_update(
                        state["codebook"][g],
                        state["cluster_size"][g],
                        seen[g],
                        indices[g],
                        decay=o.decay,
                        metric=o.metric,
                        embed_avg=average,
                        eps=o.eps,
                    )
                )
            counts = _stack(counts)
        else:
            ones = torch.ones_like(indices) if keep is None else keep.long().expand_as(indices)
            counts = torch.zeros_like(self.idle).view(self.groups, -1).scatter_add_(1, indices, ones)
            if tracked and world()[1] > 1:
                dist.all_reduce(counts)
            if tracked and o.learns_by != "sum_ema" and not (self.training and self.frozen):
                state["cluster_size"].lerp_(counts.to(torch.float32), 1 - o.decay)
        if self.training and self._rule != "frozen":
            replace_dead_codes(
                **state,
                replaced=self.window_replaced,
                steps=self.steps,
                clock=self._clock,
                x=seen,
                bins=counts,
                metric=o.metric,
                seed=o.seed,
                dead_after=float(o.dead_after),
                dead_below=float(o.dead_below),
            )
        counts = counts.view(self.window_counts.shape)
        if tracked:
            self.window_counts.add_(counts)  # += also assigns, which torch.export of a root module records
        return counts

    @torch.no_grad()
    def _start(self, seen: Tensor) -> None:
        """k-means, in the first step or after a collapse."""
        o = self.options
        # Compiled code cannot look at the clock; the op does it.
        if not torch.compiler.is_compiling() and not o.restart_below and self._clock[0]:
            return
        start_codebook(
            **self._state(),
            initialized=self.initialized,
            steps=self.steps,
            clock=self._clock,
            x=seen,
            metric=o.metric,
            iterations=o.kmeans_iterations,
            seed=o.seed,
            restart_below=0.0 if self._rule == "frozen" else float(o.restart_below),
            restart_after=o.restart_after,
        )

    def _state(self) -> dict[str, Tensor]:
        """Views of what changes with a code, with a leading dimension for the codebook; absent ones are empty."""
        empty = torch.empty(0, device=self.idle.device)
        state = {
            "codebook": self.codebook.detach(),
            "cluster_size": self.cluster_size,
            "embed_avg": self.embed_avg,
            "idle": self.idle,
            "recent": self.recent,
        }
        return {name: empty if t is None else t.unsqueeze(0) if self.groups == 1 else t for name, t in state.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedVectorQuantizer:
        """Moves between devices, but not to another dtype: averages of small steps need fp32.

        A codebook that learns by gradient is a parameter like any other and takes the dtype.
        """

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype or isinstance(t, nn.Parameter) else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also accepts the reference implementation's names, and states of quantizers with other options."""
        rename_published(state, prefix)
        fit_options(self, state, prefix, errors=args[-1])
        super()._load_from_state_dict(state, prefix, *args)
        self._clock.zero_()


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _mean_square(difference: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the squares over the rows that count, fp32 (fp64 stays); 0 for no rows."""
    if keep is None:
        return difference.square().sum() / max(difference.numel(), 1)
    count = keep.sum() * difference.shape[-1]
    return torch.where(keep[:, None], difference, 0.0).square().sum() / count.clamp(min=1)
