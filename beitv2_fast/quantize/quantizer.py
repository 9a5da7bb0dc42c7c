"""FusedVectorQuantizer: a vector quantizer on the ops of ``beitv2_fast.kernels`` that drops into other projects.

A training forward, ``forward`` below: the input's rows; k-means, if it is due; ``_quantize``: search, straight-through
output and loss (kernels/vector_quantize); ``_learn``: the codebook's EMA step (kernels/codebook_update) and a new start
for dead codes (collapse.py).
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search, draw_codes
from ..kernels.checks import FLOATS
from ..kernels.codebook_search.reference import look_up, numbered
from ..kernels.codebook_update.ops import ema_step, sum_over_ranks
from ..kernels.sampling import ALONE, salt
from ..kernels.snapshot import Snapshot, copy_codebook, recomputing, to_be_recomputed
from ..kernels.vector_quantize.ops import quantize
from ..kernels.vector_quantize.reference import vector_quantize_reference
from .collapse import ASKED_WHEN_COMPILED, CLOCK, look, refuse_gathered_copy, replace_dead_codes, start_codebook
from .options import DEAD_AFTER, check_options
from .states import QuantizerState, perplexity


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


class FusedVectorQuantizer(QuantizerState):
    """A layer that replaces vectors by codes of a codebook that it learns.

    By default the quantizer of BEiT v2 (arXiv 2208.06366 section 2.2): l2-normalized vectors, cosine search, codebook
    moved by EMA, k-means on the first batch. Dead codes restart, which the reference's do not: ``dead_after=0`` is
    exact parity with it.

        quantizer = FusedVectorQuantizer(num_codes=8192, dim=32)
        out = quantizer(z)  # z [..., 32] -> out.quantized, out.indices, out.loss, out.counts, out.perplexity

    With ``y = l2(z)`` (cosine) or ``y = z`` (euclidean) and code ``v`` nearest to ``y``: ``quantized = y + sg(v - y)``,
    ``loss = commitment_weight mean((sg(v) - y)^2)``, and where the codebook, or a transform of it, learns by gradient
    ``+ codebook_weight mean((v - sg(y))^2)`` (VQ-VAE eq. 3).

    State (float buffers stay fp32 whatever ``.to(dtype)`` says): ``codebook`` [K, D], or [heads, K, D] with separate
    codebooks; ``cluster_size`` [K], EMA of how often each code is chosen (for the learning rules that do not need it
    also updated in eval mode, as the reference does for its usage reports); ``embed_avg`` with sum_ema; ``initialized``
    bool; ``idle`` [K] int64, vectors seen since a code was last chosen; ``steps`` int64. All of it holds the same bits
    on every rank: statistics are summed over the default process group, in eval mode too (see ``track_eval_usage``).

    Args:
        num_codes: K.
        dim: the width of the vectors.
        metric: "cosine" (vectors and codes at unit length) or "euclidean".
        learning: how the codebook follows the vectors in training mode. "code_ema": moving average of the codes
            themselves (BEiT v2; cosine only, its default). "sum_ema": moving averages of counts and sums; their ratio
            is the code (VQ-VAE appendix A.1; default for euclidean). "gradient": a parameter, for your optimizer.
            "frozen": not at all.
        transform: of the codebook before it is searched (SimVQ, arXiv 2411.02038): a module, [G, K, C] -> [G, K, D],
            that learns by gradient. The codebook itself stays as drawn (``C^-1/2`` times standard normal), or with
            learning="gradient" gets its gradient through the transform. As no vector of a batch can become a code,
            k-means and restarts are off.
        stored_dim: C, by default D.
        decay: of the moving averages.
        eps: Laplace smoothing of sum_ema's counts.
        commitment_weight: of the loss's term that moves the vectors.
        codebook_weight: of its term that moves the codes, with learning="gradient".
        gradient: how it passes to the vectors: "straight_through", or by "rotation" (arXiv 2410.06424). "codes": not to
            them but to the codes that were chosen, where the codebook learns by gradient.
        temperature: in training, codes are drawn with probability softmax(similarity / temperature) (``draw_codes`` of
            the kernels), a function of the seed, the step and the vector's place in the batch of all ranks; 0: the
            nearest code.
        heads: the width is cut into this many parts, each with its own code.
        share_codebook: one codebook for all heads instead of one each.
        channel_last: vectors lie along the last dimension; otherwise along dimension 1, as in [B, C, H, W].
        kmeans_init: the first training batch initializes the codebook by k-means over all ranks, in
            ``kmeans_iterations``; otherwise it starts random (unit length for cosine, standard normal for euclidean).
        dead_after: a code that was not chosen for ``dead_after * num_codes`` vectors (the average code would have been
            chosen ``dead_after`` times) starts again at a vector of the batch, with all of its state; 0: never, as the
            reference.
        dead_below: with sum_ema, a code also restarts when its cluster size (EMA of its uses per step) is under this.
        restart_below: if fewer than this share of the codes were chosen in ``restart_after`` steps, k-means starts the
            codebook again; 0: never.
        track_eval_usage: forwards in eval mode count for ``usage()`` and ``cluster_size``, summed over ranks, so all
            ranks have to run them alike. Turn it off where only one rank evaluates (or use ``encode``, never counted).
        sync: True: statistics and draws are over all ranks of the default process group. False: every rank by itself,
            with a codebook of its own. Or a process group (or its name), whose ranks share one.
        seed: of all random draws: start, k-means, restarts.

    Raises:
        ValueError: naming the option that makes no sense.
    """

    any_length = False  # whether codes for cosine keep the lengths with which they are loaded

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        metric: str = "cosine",
        learning: str | None = None,
        transform: nn.Module | None = None,
        stored_dim: int | None = None,
        decay: float = 0.99,
        eps: float = 1e-5,
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        gradient: str = "straight_through",
        temperature: float = 0.0,
        heads: int = 1,
        share_codebook: bool = False,
        channel_last: bool = True,
        kmeans_init: bool = True,
        kmeans_iterations: int = 10,
        dead_after: float = DEAD_AFTER,
        dead_below: float = 0.0,
        restart_below: float = 0.0,
        restart_after: int = 100,
        track_eval_usage: bool = True,
        sync: bool | str | dist.ProcessGroup = True,
        seed: int = 0,
    ):
        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        by_default = "frozen" if transform is not None else "code_ema" if metric == "cosine" else "sum_ema"
        self.metric, self.learning = metric, learning or by_default
        self.transform, self.stored_dim = transform, stored_dim
        if transform is not None:
            kmeans_init, dead_after, restart_below, self.any_length = False, 0.0, 0.0, True
        self.decay, self.eps, self.gradient, self.temperature = decay, eps, gradient, temperature
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.heads, self.share_codebook, self.channel_last = heads, share_codebook, channel_last
        self.kmeans_init, self.kmeans_iterations, self.seed = kmeans_init, kmeans_iterations, seed
        self.dead_after, self.dead_below = float(dead_after), float(dead_below)
        self.restart_below, self.restart_after = float(restart_below), restart_after
        self.track_eval_usage = track_eval_usage
        self.sync = sync if isinstance(sync, bool | str) else sync.group_name  # a group cannot be copied
        check_options(self)
        self.code_dim = dim // heads
        self.groups = 1 if share_codebook else heads  # codebooks
        each = (num_codes,) if self.groups == 1 else (self.groups, num_codes)
        codes = (*each, stored_dim or self.code_dim)
        if self.learning == "gradient":
            self.codebook = nn.Parameter(torch.empty(codes))
        else:
            self.register_buffer("codebook", _floats(codes))
        self.register_buffer("cluster_size", _floats(each))
        self.register_buffer("initialized", torch.empty((), dtype=torch.bool))
        self.register_buffer("idle", torch.empty(each, dtype=torch.int64))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        # Absent ones are no buffers of None: torch.export of a root module mistakes what follows those.
        if self.learning == "sum_ema":
            self.register_buffer("embed_avg", _floats(codes))
        else:
            self.embed_avg = None
        if restart_below:
            self.register_buffer("recent", torch.empty(each, dtype=torch.int64))
        else:
            self.recent = None
        # For the logs, no part of a checkpoint: how often each code was chosen, and how many restarted, in the window.
        self.register_buffer("window_counts", torch.empty(each, dtype=torch.int64), persistent=False)
        self.register_buffer("window_replaced", torch.empty((), dtype=torch.int64), persistent=False)
        # What the host knows of ``initialized`` and ``steps``, so that it need not read them from the device.
        self.clock = torch.zeros(CLOCK, dtype=torch.int64, device="cpu")
        # Gradient accumulation: this many training forwards make one step, and the codebook moves in the last of them.
        self.forwards_per_step = 1
        self.reset_parameters()

    def extra_repr(self) -> str:
        options = [o for o in inspect.signature(FusedVectorQuantizer).parameters.values() if o.name != "transform"]
        changed = [f"{o.name}={getattr(self, o.name)!r}" for o in options if getattr(self, o.name) != o.default]
        return ", ".join([*changed, *["frozen"] * self.frozen])

    def forward(self, z: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None) -> Quantized:
        """Quantize vectors; in training mode also move the codebook.

        Args:
            z: [..., dim], or [B, dim, ...] with ``channel_last=False``, e.g. image maps [B, C, H, W]. Any float dtype.
            mask: bool, the shape of z without the channels: True for the vectors that count. The others influence
                nothing and come out as zeros with index -1.
            chosen: int64 [N G], of the codebooks in turn, in eval mode: the codes to take in place of the nearest.

        Raises:
            ValueError: z or mask of another shape, z on another device. TypeError: z or mask of another dtype.
        """
        if self._made_on_meta:
            self._leave_meta()
        x, keep = self._in_turn(z), self._row_mask(mask, z)
        compiling, device = torch.compiler.is_compiling(), z.device.type
        casts = compiling or torch.is_autocast_enabled(device)  # for a context that changes nothing costs host time
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            if keep is not None:
                x = torch.where(keep[:, None], x, 1.0)  # padding may hold NaN, and zeros have no direction
            seen = self._seen(x, keep)
            again, snapshot = not compiling and recomputing(), None
            if again and (self._learns or self._draws):
                snapshot = self.snapshots.find(x)
            elif self.training and not again:
                restarts = self.kmeans_init or self.dead_after or self.restart_below
                if self._rule == "gradient" and restarts and (ASKED_WHEN_COMPILED or not compiling):
                    refuse_gathered_copy(self, "codebook")
                self._start(seen)
                if (self._learns or self._draws) and not compiling and to_be_recomputed():
                    snapshot = self.snapshots.keep(x, self.codebook)
            codebook = self._searched(snapshot)
            drawn = self._drawn(x, codebook, snapshot) if self._draws else chosen
            quantized, indices, loss = self._quantize(x, codebook, keep, drawn)
            if again:
                counts = snapshot.counts if snapshot else None
                counts = self._count(indices, keep) if counts is None else counts
            else:
                counts = self._learn_when_due(seen, indices, keep)
                if snapshot is not None:
                    snapshot.counts = counts
            last = z if self.channel_axis(z) == -1 else z.movedim(1, -1)
            quantized = quantized.reshape(last.shape).to(z.dtype)
            quantized = quantized if last is z else quantized.movedim(-1, 1)
        return Quantized(quantized, self._index_map(indices, keep, z), loss, counts)

    @torch.no_grad()
    def start(self, z: Tensor, mask: Tensor | None = None) -> None:
        """k-means on vectors as ``forward`` takes them, if it is due: where several forwards make the first step."""
        self._start(self._seen(self._in_turn(z), self._row_mask(mask, z)))

    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors -> indices as in ``forward``, and nothing else changes."""
        x = self._in_turn(z)
        with torch.autocast(z.device.type, enabled=False):
            indices = self._nearest(x, self._searched())
        return self._index_map(indices, self._row_mask(mask, z), z)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them -> the vectors that it returned, fp32; index -1 gives zeros.

        Raises:
            ValueError: with several heads, a last dimension that is not ``heads``.
            TypeError: indices that are not integers.
            IndexError: indices from ``num_codes`` on; of CUDA tensors, an error of the device.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"decode: indices must be integers; got {indices.dtype}")
        indices = indices.long()  # files of codes hold uint16, which torch can neither clamp nor compare
        heads = self.heads
        if heads > 1 and (indices.dim() == 0 or indices.shape[-1] != heads):
            raise ValueError(f"decode: indices must be [..., {heads}], one for each head; got {list(indices.shape)}")
        codes = look_up(self._searched(), indices.clamp(min=0).flatten()).view(*indices.shape, self.code_dim)
        codes = torch.where((indices >= 0)[..., None], codes, 0.0)
        codes = codes.flatten(-2) if heads > 1 else codes
        return codes.movedim(-1, self.channel_axis(codes))

    def channel_axis(self, z: Tensor) -> int:
        """The dimension along which the vectors of z lie."""
        return -1 if self.channel_last or z.dim() < 2 else 1

    def _rows(self, z: Tensor) -> Tensor:
        """What the codebooks see of z, [G, N, D]: N vectors, times the heads if these share a codebook."""
        return self._in_turn(z).view(-1, self.groups, self.code_dim).transpose(0, 1)

    def _in_turn(self, z: Tensor) -> Tensor:
        """``_rows`` as they lie in memory, those of the codebooks in turn: [N G, D]."""
        if z.dtype not in FLOATS:
            raise TypeError(f"expected vectors of a floating-point dtype; got {z.dtype}. Cast them with .float().")
        if z.dim() == 0 or z.shape[self.channel_axis(z)] != self.dim:
            where = "in the last dimension" if self.channel_last else "in dimension 1 (channel_last=False)"
            raise ValueError(f"expected vectors of width {self.dim} {where}; got {list(z.shape)}")
        if z.device != self.codebook.device:
            raise ValueError(f"the vectors are on {z.device}, the codebook on {self.codebook.device}; move one of them")
        last = z if self.channel_axis(z) == -1 else z.movedim(1, -1)
        return last.reshape(-1, self.code_dim)

    def _places(self, z: Tensor) -> torch.Size:
        """The shape of z without the channels."""
        return z.shape[:-1] if self.channel_axis(z) == -1 else z.shape[:1] + z.shape[2:]

    def _index_map(self, indices: Tensor, keep: Tensor | None, z: Tensor) -> Tensor:
        """[N G] -> the shape of z without the channels, and with several heads their number last; -1 if not kept."""
        indices = indices if keep is None else torch.where(keep, indices, -1)
        return indices.view(self._places(z) if self.heads == 1 else (*self._places(z), self.heads))

    def _row_mask(self, mask: Tensor | None, z: Tensor) -> Tensor | None:
        """The mask for the rows of the codebooks in turn, [N G]."""
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True for the vectors that count; got {mask.dtype}")
        if mask.shape != self._places(z):
            expected = list(self._places(z))
            raise ValueError(f"mask must be {expected} for vectors {list(z.shape)}; got {list(mask.shape)}")
        return mask.reshape(-1, 1).expand(-1, self.heads).reshape(-1)

    @staticmethod
    def _seen(x: Tensor, keep: Tensor | None) -> Tensor:
        """The rows to learn from: the update leaves out vectors of NaN, so padding does not count."""
        return x.detach() if keep is None else x.detach().masked_fill(~keep[:, None], torch.nan)

    @property
    def _group(self) -> str | None:
        """The name of the process group, None for the default one."""
        return None if self.sync is True else self.sync or ALONE

    @property
    def _rule(self) -> str:
        return "frozen" if self.frozen else self.learning

    @property
    def _learns(self) -> bool:
        """Whether a forward changes the codebook."""
        return self.training and self._rule != "frozen"

    @property
    def _draws(self) -> bool:
        return self.training and self.temperature > 0

    def _drawn(self, rows: Tensor, codebook: Tensor, snapshot: Snapshot | None) -> Tensor:
        """Indices [N G] for rows [N G, D]; a recomputation draws what its first forward drew."""
        key = None if snapshot is None else snapshot.draw
        if key is None:
            key = torch.as_tensor(salt(self.seed, self.steps, len(self._waiting)))
        if snapshot is not None:
            snapshot.draw = key
        options: dict[str, Any] = {"metric": self.metric, "temperature": self.temperature}
        codebooks = codebook.view(self.groups, self.num_codes, -1)
        return draw_codes(rows, codebooks, seed=key, process_group=self._group, **options)

    def _codebooks(self) -> Tensor:
        """``_searched`` as [G, K, D]."""
        return self._searched().view(self.groups, self.num_codes, self.code_dim)

    def _searched(self, snapshot: Snapshot | None = None) -> Tensor:
        """The codebook as it is searched, [K, D], or several in turn, [G, K, D]; differentiable where they or a
        transform learn by gradient.

        What autograd keeps is a copy: the codebook itself changes in the same step.
        """
        codes, gradient = snapshot.codebook if snapshot else self.codebook, self.learning == "gradient"
        if torch.compiler.is_compiling() and (gradient or self._learns):
            codes = copy_codebook(self.codebook, None)
        elif gradient:
            codes = copy_codebook(self.codebook, codes.detach())
        if self.transform is not None:
            of_weights = next(self.transform.parameters(), codes).dtype
            with torch.autocast(codes.device.type, enabled=False):
                codes = self.transform(codes.view(self.groups, self.num_codes, -1).to(of_weights)).float()
            if codes.shape != (self.groups, self.num_codes, self.code_dim):
                expected = [self.groups, self.num_codes, self.code_dim]
                raise ValueError(f"transform must return codes {expected}; it returned {list(codes.shape)}")
            codes = codes.squeeze(0) if self.groups == 1 else codes
        if (gradient or self.transform is not None) and self.metric == "cosine":
            codes = F.normalize(codes, dim=-1)
        return codes

    def _nearest(self, x: Tensor, codes: Tensor) -> Tensor:
        """Indices [N] of the codes [K, D], or [G, K, D] in turn, for x [N, D]."""
        return codebook_search(x, codes, metric=self.metric).indices

    def _quantize(
        self, x: Tensor, codebook: Tensor, keep: Tensor | None, drawn: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D], one codebook or several in turn -> (quantized [N, D], indices [N], loss); of the codes drawn, if
        there are any."""
        by_gradient = not self.frozen and (self.learning == "gradient" or self.transform is not None)
        weights = self.commitment_weight, self.codebook_weight if by_gradient else 0.0
        if keep is None and drawn is None and self.gradient != "codes":
            codes = codebook if weights[1] else codebook.detach()  # no gradient, which is not one of zeros
            out, indices, loss, _ = quantize(x, codes, self.metric, *weights, False, self.gradient)
            return out, indices, loss
        indices = self._nearest(x, codebook) if drawn is None else drawn
        how: dict[str, Any] = {"indices": indices, "keep": keep, "gradient": self.gradient}
        return vector_quantize_reference(x, codebook, self.metric, *weights, **how)[:3]

    def _learn_when_due(self, seen: Tensor, indices: Tensor, keep: Tensor | None) -> Tensor:
        """``_learn`` from all vectors of a step at its last forward; the counts are zeros until then."""
        if not self.training or self.forwards_per_step == 1:
            return self._learn(seen, indices, keep)
        counted = torch.ones_like(indices, dtype=torch.bool) if keep is None else keep
        self._waiting.append((seen, indices, counted))
        if len(self._waiting) < self.forwards_per_step:
            return torch.zeros_like(self.window_counts)
        all_seen, found, keeps = zip(*self._waiting, strict=True)
        self._waiting = []
        return self._learn(torch.cat(all_seen), torch.cat(found), torch.cat(keeps))

    def _learn(self, seen: Tensor, indices: Tensor, keep: Tensor | None) -> Tensor:
        """Move the codebook and keep the statistics; returns how often each code was chosen, over all ranks.

        Nothing here has a gradient. Hence no no_grad(), which torch.export would make a region that it cannot save.
        """
        learns, tracked = self._learns, self.training or self.track_eval_usage
        if learns and self.learning != "gradient":
            counts = self._move_codebooks(seen, indices)
        else:
            counts = self._count(indices, keep)
            if tracked:
                sum_over_ranks(counts, self._group)
            if tracked and self.learning != "sum_ema" and not (self.training and self.frozen):
                self.cluster_size.lerp_(counts.to(torch.float32), 1 - self.decay)
        if learns:
            window = self.window_counts, self.window_replaced, self.steps
            options = self.metric, self.seed, self.dead_after, self.dead_below, self._group
            replace_dead_codes(*self._state(), *window, self.clock, seen, counts, *options)
            return counts
        if self._draws:
            self.steps.add_(1)  # the next step draws anew
        if tracked:
            self.window_counts.add_(counts)  # += also assigns, which torch.export of a root module records
        return counts

    def _move_codebooks(self, seen: Tensor, indices: Tensor) -> Tensor:
        """The EMA step of every codebook; returns counts, over all ranks."""
        options = self.decay, self.metric, self.eps, self._group
        return ema_step(self.codebook, self.cluster_size, self.embed_avg, seen, indices, *options)

    def _count(self, indices: Tensor, keep: Tensor | None) -> Tensor:
        """How often each code was chosen on this rank."""
        ones = torch.ones_like(indices) if keep is None else keep.long()
        counts = torch.zeros_like(self.idle)
        counts.view(-1).scatter_add_(0, numbered(indices, self.groups, self.num_codes), ones)
        return counts

    def _start(self, seen: Tensor) -> None:
        """k-means, in the first step or after a collapse, on vectors without a gradient."""
        look_here = not self.restart_below and not torch.compiler.is_compiling()  # elsewhere the op looks
        if look_here and look(self.clock, self.initialized, self.steps):
            return
        below = 0.0 if self._rule == "frozen" else self.restart_below
        options = self.metric, self.kmeans_iterations, self.seed, below, self.restart_after, self._group
        start_codebook(*self._state(), self.initialized, self.steps, self.clock, seen, *options)

    def _state(self) -> tuple[Tensor | None, ...]:
        """What a restart changes of codes."""
        return self.codebook.detach(), self.cluster_size, self.embed_avg, self.idle, self.recent


def _floats(shape: tuple[int, ...]) -> Tensor:
    """fp32, whatever the default dtype is, and where DeepSpeed's zero.Init makes every constructor's result bf16."""
    return torch.empty(shape, dtype=torch.float32).float()
