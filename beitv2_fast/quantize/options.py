"""What can be chosen about a FusedVectorQuantizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..kernels.checks import check_metric

LEARNING = ("code_ema", "sum_ema", "gradient", "frozen")
GRADIENT = ("straight_through", "rotation")
DEAD_AFTER = 50.0  # the default, chosen by `python -m bench.collapse`: 25 to 100 fill a codebook, 200 takes long


@dataclass(frozen=True)
class QuantizerOptions:
    """Options of a FusedVectorQuantizer, all of them keyword arguments.

    Args:
        metric: "cosine" (vectors and codes at unit length) or "euclidean".
        learning: how the codebook follows the vectors in training mode. "code_ema": moving average of the codes
            themselves (BEiT v2; cosine only, its default). "sum_ema": moving averages of counts and sums; their ratio
            is the code (VQ-VAE appendix A.1; default for euclidean). "gradient": a parameter with the loss
            ``codebook_weight mean((v - sg(y))^2)`` (VQ-VAE eq. 3), for your optimiser. "frozen": not at all.
        decay: of the moving averages. eps: Laplace smoothing of sum_ema's counts.
        commitment_weight: beta. codebook_weight: see "gradient".
        gradient: how it passes to the vectors: "straight_through", or by "rotation" (arXiv 2410.06424).
        heads: the width is cut into so many parts with a code for each. share_codebook: one codebook for all heads
            instead of one each.
        channel_last: vectors lie along the last dimension; otherwise along dimension 1, as in [B, C, H, W].
        kmeans_init: the first training batch initialises the codebook by k-means over all ranks, in
            ``kmeans_iterations``; otherwise it starts random (unit length for cosine, standard normal for euclidean).
        dead_after: a code that was not chosen for ``dead_after * num_codes`` vectors (the average code would have been
            chosen ``dead_after`` times) starts again at a vector of the batch, with all of its state; 0: never, as the
            reference.
        dead_below: with sum_ema, a code whose cluster size (EMA of its uses a step) fell under this starts again, too.
        restart_below: if fewer than this share of the codes were chosen in ``restart_after`` steps, k-means starts the
            codebook again; 0: never.
        track_eval_usage: forwards in eval mode count for ``usage()`` and ``cluster_size``, summed over ranks, so all
            ranks have to run them alike. Turn it off where one rank evaluates alone (or use ``encode``, never counted).
        seed: of all random draws: start, k-means, restarts.
    """

    metric: str = "cosine"
    learning: str | None = None
    decay: float = 0.99
    eps: float = 1e-5
    commitment_weight: float = 1.0
    codebook_weight: float = 1.0
    gradient: str = "straight_through"
    heads: int = 1
    share_codebook: bool = False
    channel_last: bool = True
    kmeans_init: bool = True
    kmeans_iterations: int = 10
    dead_after: float = DEAD_AFTER
    dead_below: float = 0.0
    restart_below: float = 0.0
    restart_after: int = 100
    track_eval_usage: bool = True
    seed: int = 0

    @property
    def learns_by(self) -> str:
        return self.learning or ("code_ema" if self.metric == "cosine" else "sum_ema")

    @property
    def writes_to_parameter(self) -> bool:
        """Whether forwards change the codebook although it is a parameter."""
        return self.learns_by == "gradient" and bool(self.kmeans_init or self.dead_after or self.restart_below)

    def check(self, num_codes: int, dim: int) -> None:
        """Raise ValueError for options that make no sense, saying which."""
        check_metric(self.metric)
        if num_codes < 1 or dim < 1:
            raise ValueError(f"num_codes and dim must be positive; got {num_codes} and {dim}")
        if self.heads < 1 or dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads; got dim={dim}, heads={self.heads}")
        for name, allowed in (("learning", LEARNING), ("gradient", GRADIENT)):
            value = getattr(self, name)
            if value not in allowed and not (name == "learning" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if self.learns_by == "code_ema" and self.metric != "cosine":
            raise ValueError("learning='code_ema' averages unit vectors: take metric='cosine' or learning='sum_ema'")
        for name in ("decay", "restart_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        for name in ("commitment_weight", "codebook_weight", "dead_after", "dead_below", "eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        for name in ("kmeans_iterations", "restart_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.dead_below and self.learns_by != "sum_ema":
            raise ValueError(
                f"dead_below compares cluster sizes, which learning={self.learns_by!r} only reports and may reset: "
                "take dead_after, or learning='sum_ema'"
            )

    def changed(self) -> str:
        """The options that differ from the defaults, for a repr."""
        pairs = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return ", ".join(f"{name}={value!r}" for name, value, default in pairs if value != default) or "defaults"
