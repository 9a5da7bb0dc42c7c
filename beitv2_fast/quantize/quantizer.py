"""FusedVectorQuantizer: a vector quantizer on the ops of ``beitv2_fast.kernels`` that drops into other projects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search, codebook_update, vector_quantize
from ..kernels.sampling import world
from ..kernels.snapshot import Snapshot, Snapshots, copy_codebook, recomputing, to_be_recomputed
from .collapse import ASKED_WHEN_COMPILED, CLOCK, look, refuse_gathered_copy, replace_dead_codes, start_codebook
from .layout import Layout
from .options import QuantizerOptions
from .published import fit_options, rename_published


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
        if o.learns_by == "gradient":
            self.codebook = nn.Parameter(torch.empty(*shape, self.code_dim))
        else:
            self.register_buffer("codebook", _floats(*shape, self.code_dim))
        sums = o.learns_by == "sum_ema"
        self.register_buffer("cluster_size", _floats(*shape))
        self.register_buffer("initialized", torch.empty((), dtype=torch.bool))
        self.register_buffer("idle", torch.empty(shape, dtype=torch.int64))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        # Absent ones are no buffers of None: torch.export of a root module mistakes what follows those.
        if sums:
            self.register_buffer("embed_avg", _floats(*shape, self.code_dim))
        else:
            self.embed_avg = None
        if o.restart_below:
            self.register_buffer("recent", torch.empty(shape, dtype=torch.int64))
        else:
            self.recent = None
        # For the logs, no part of a checkpoint: how often each code was chosen, and how many restarted, in the window.
        self.register_buffer("window_counts", torch.empty(shape, dtype=torch.int64), persistent=False)
        self.register_buffer("window_replaced", torch.empty((), dtype=torch.int64), persistent=False)
        # What the host knows of the buffers that decide, which spares it a look at the device in every step.
        self._clock = torch.zeros(CLOCK, dtype=torch.int64, device="cpu")
        # Gradient accumulation: so many training forwards make one step, and the codebook moves in the last of them.
        self.forwards_per_step = 1
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The state of a new quantizer, where its tensors are: after ``to_empty``, as with torch's own modules."""
        o = self.options
        shape, generator = self.codebook.shape, torch.Generator().manual_seed(o.seed)
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        self.codebook.copy_(F.normalize(start, dim=-1) if o.metric == "cosine" else start)
        if self.embed_avg is not None:
            self.embed_avg.copy_(self.codebook)
        self.cluster_size.fill_(self.embed_avg is not None)
        self.initialized.fill_(not o.kmeans_init)
        for counter in (self.idle, self.steps, self.recent):
            if counter is not None:
                counter.zero_()
        self._reset_unsaved()

    def _reset_unsaved(self) -> None:
        """A new start for what no checkpoint holds, on the device of what it does hold."""
        for name in ("window_counts", "window_replaced"):
            if getattr(self, name).device == self.idle.device:
                getattr(self, name).zero_()
            else:
                setattr(self, name, torch.zeros_like(getattr(self, name), device=self.idle.device))
        self._clock.zero_()
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._snapshots = Snapshots()
        self._made_on_meta = self.idle.is_meta

    def _leave_meta(self) -> None:
        """No counts yet in the memory that took the place of meta's, which transformers' loader leaves as it is."""
        if self._made_on_meta and not self.idle.is_meta:
            self._reset_unsaved()

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
        self._leave_meta()
        with torch.autocast(z.device.type, enabled=False):
            x = self.layout.rows(z)  # [G, N, D]
            keep = None if mask is None else self.layout.row_mask(mask, z)
            if keep is not None:
                x = torch.where(keep[:, None], x, 1.0)  # padding may hold NaN, and zeros have no direction
            # The update leaves out vectors of NaN: that is how it is told which ones do not count.
            seen = x.detach() if keep is None else x.detach().masked_fill(~keep[:, None], torch.nan)
            again, snapshot = not torch.compiler.is_compiling() and recomputing(), None
            if again and self._learns:
                snapshot = self._snapshots.find(x)
            elif self.training and not again:
                askable = ASKED_WHEN_COMPILED or not torch.compiler.is_compiling()
                if self.options.writes_to_parameter and not self.frozen and askable:
                    refuse_gathered_copy(self, "codebook")
                self._start(seen)
                if self._learns and not torch.compiler.is_compiling() and to_be_recomputed():
                    snapshot = self._snapshots.keep(x, self.codebook)
            codebooks = self._codebooks(snapshot)
            parts = [self._quantize(x[g], codebooks[g], keep) for g in range(self.groups)]
            quantized, indices, losses = (_stack(part) for part in zip(*parts, strict=True))  # [G, N, D], [G, N], [G]
            if again:
                counts = snapshot.counts if snapshot else self._count(indices, keep).view(self.idle.shape)
            else:
                counts = self._learn_when_due(seen, indices, keep)
                if snapshot is not None:
                    snapshot.counts = counts
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
            books = self._codebooks()
            indices = _stack([self._nearest(x[g], books[g]) for g in range(self.groups)])
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
        chosen, codebooks = indices.clamp(min=0), self._codebooks()
        if self.groups == 1:
            codes = F.embedding(chosen, codebooks[0])
        else:
            codes = torch.stack([F.embedding(chosen[..., g], codes) for g, codes in enumerate(codebooks)], dim=-2)
        codes = torch.where((indices >= 0)[..., None], codes, 0.0)
        if heads > 1:
            codes = codes.flatten(-2)
        return codes if self.options.channel_last or codes.dim() < 2 else codes.movedim(-1, 1)

    @torch.no_grad()
    def usage(self, reset: bool = False) -> dict[str, float]:
        """Since the last reset: share of codes chosen, perplexity of their frequencies, how many dead codes restarted.

        Share and perplexity are means over the codebooks.
        """
        self._leave_meta()
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

    @property
    def _learns(self) -> bool:
        """Whether a forward changes the codebook."""
        return self.training and self._rule != "frozen"

    @property
    def has_unit_codes(self) -> bool:
        """Whether the codebook itself holds unit vectors: with cosine, but a learnt parameter is normalised at use."""
        return self.options.metric == "cosine" and self.options.learns_by != "gradient"

    @property
    def _rule(self) -> str:
        return "frozen" if self.frozen else self.options.learns_by

    def _codebooks(self, snapshot: Snapshot | None = None) -> Tensor:
        """The codebooks as they are searched, [G, K, D]; differentiable where they learn by gradient.

        What autograd keeps is a copy: the codebook itself changes in the same step.
        """
        codes, gradient = snapshot.codebook if snapshot else self.codebook, self.options.learns_by == "gradient"
        if torch.compiler.is_compiling() and (gradient or self._learns):
            codes = copy_codebook(self.codebook, None)
        elif gradient:
            codes = copy_codebook(self.codebook, codes.detach())
        if gradient and self.options.metric == "cosine":
            codes = F.normalize(codes, dim=-1)
        return codes.unsqueeze(0) if self.groups == 1 else codes

    def _nearest(self, x: Tensor, codes: Tensor) -> Tensor:
        """Indices [N] of the codes [K, D] for x [N, D]."""
        return codebook_search(x, codes, metric=self.options.metric).indices

    def _quantize(self, x: Tensor, codebook: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One codebook: x [N, D] -> (quantized [N, D], indices [N], loss)."""
        o = self.options
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
        shortest = max(EPS, torch.finfo(x.dtype).smallest_normal)  # of fp16, 6e-5: below, few bits are left
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
            for g in range(self.groups):
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
            counts = self._count(indices, keep)
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

    def _count(self, indices: Tensor, keep: Tensor | None) -> Tensor:
        """How often each code was chosen on this rank, [G, K]."""
        ones = torch.ones_like(indices) if keep is None else keep.long().expand_as(indices)
        return torch.zeros_like(self.idle).view(self.groups, -1).scatter_add_(1, indices, ones)

    @torch.no_grad()
    def _start(self, seen: Tensor) -> None:
        """k-means, in the first step or after a collapse."""
        o = self.options
        # Compiled code cannot look; the op does it.
        compiling = torch.compiler.is_compiling()
        if not compiling and not o.restart_below and look(self._clock, self.initialized, self.steps):
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
        empty = torch.empty(0, dtype=torch.float32, device=self.idle.device)
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
        for name, buffer in self.named_buffers(recurse=False):
            if isinstance(state.get(prefix + name), Tensor):  # assign=True would take any dtype
                state[prefix + name] = state[prefix + name].to(buffer.dtype)
        super()._load_from_state_dict(state, prefix, *args)
        self._reset_unsaved()


def _floats(*shape: int) -> Tensor:
    """fp32, whatever the default dtype is, and where DeepSpeed's zero.Init makes every constructor's result bf16."""
    return torch.empty(shape, dtype=torch.float32).float()


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _mean_square(difference: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the squares over the rows that count, fp32 (fp64 stays); 0 for no rows."""
    if keep is None:
        return difference.square().sum() / max(difference.numel(), 1)
    count = keep.sum() * difference.shape[-1]
    return torch.where(keep[:, None], difference, 0.0).square().sum() / count.clamp(min=1)


class Quantized(NamedTuple):
    """What a quantizer returns.

    quantized: of the input's shape and dtype. indices: int64, the input's shape without the channels, and [..., heads]
    with several heads. loss: scalar fp32, 0 in a batch of no vectors. counts: int64 [K], how often each code was
    chosen in this batch over all ranks ([heads, K] with separate codebooks).
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp(entropy) of the codes' frequencies in this batch: [] or [heads]."""
        return perplexity(self.counts)


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of frequencies counts / sum: [..., K] -> [...] float64."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


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
