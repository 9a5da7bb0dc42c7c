"""FusedVectorQuantizer: a vector quantizer on the ops of ``beitv2_fast.kernels`` that drops into other projects."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import codebook_search, codebook_update, vector_quantize

REPLACE_EVERY = 8  # steps between looks for dead codes


class Quantized(NamedTuple):
    """quantized, of the input's shape; indices [...] int64; the scalar commitment loss."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class FusedVectorQuantizer(nn.Module):
    """Quantizer of BEiT v2: l2-normalised vectors, cosine search, EMA codebook (arXiv 2208.06366 section 2.2).

    Buffers: ``codebook`` [K, D] fp32, unit rows; ``cluster_size`` [K] fp32, an EMA of how often each code is chosen
    (also updated in eval mode, as the reference does for its usage reports); ``initialized`` bool; ``idle`` [K] int64,
    vectors seen since a code was last chosen; ``steps`` int64.

    Dead codes: without help most of a codebook dies on small data. A code that was not chosen for ``dead_after * K``
    vectors (a code of average popularity would have been chosen ``dead_after`` times) starts again at a vector of the
    batch, the same one on every rank, with all of its state.

    Args:
        num_codes: K. dim: D.
        decay: of the EMA. commitment_weight: beta.
        kmeans_init: the first training batch initialises the codebook by k-means (10 iterations, the same on every
            rank); otherwise it starts as random unit vectors.
        dead_after: see above; 0 leaves dead codes dead, as the reference does.
        seed: of the random start and of the k-means samples.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        kmeans_init: bool = True,
        kmeans_iterations: int = 10,
        dead_after: float = 200.0,
        seed: int = 0,
    ):
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"num_codes and dim must be positive; got {num_codes} and {dim}")
        self.num_codes, self.dim = num_codes, dim
        self.decay, self.commitment_weight = decay, commitment_weight
        self.kmeans_iterations, self.dead_after, self.seed = kmeans_iterations, dead_after, seed
        start = torch.randn(num_codes, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("codebook", F.normalize(start, dim=-1))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("initialized", torch.tensor(not kmeans_init))
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # How often each code was chosen since the last usage(reset=True): for the logs, no part of a checkpoint.
        self.register_buffer("window_counts", torch.zeros(num_codes, dtype=torch.int64), persistent=False)
        # Copies on the host of ``initialized`` and ``steps``, which spare it a look at the device in every step.
        self._is_initialized = not kmeans_init
        self._host_steps: int | None = None

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}, decay={self.decay}, beta={self.commitment_weight}"

    def forward(self, z: Tensor) -> Quantized:
        """Quantize vectors [..., D]; in training mode also move the codebook."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"expected vectors of width {self.dim} in the last dimension; got {list(z.shape)}")
        x = z.reshape(-1, self.dim)
        if self.training and not self._is_initialized:
            self._initialize(x.detach())
        result = vector_quantize(x, self.codebook, commitment_weight=self.commitment_weight)
        if self.training:
            bins = codebook_update(self.codebook, self.cluster_size, x.detach(), result.indices, decay=self.decay)
            self._replace_dead_codes(x.detach(), bins)
        else:
            bins = torch.bincount(result.indices, minlength=self.num_codes)
            if _distributed():
                dist.all_reduce(bins)
            self.cluster_size.lerp_(bins.to(self.cluster_size.dtype), 1 - self.decay)
        self.window_counts += bins
        return Quantized(result.quantized.view(z.shape), result.indices.view(z.shape[:-1]), result.loss)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Vectors [..., D] -> codes [...] int64, and nothing else changes."""
        return codebook_search(z.reshape(-1, self.dim), self.codebook).indices.view(z.shape[:-1])

    def usage(self, reset: bool = False) -> dict[str, float]:
        """Share of codes chosen since the last reset, and perplexity exp(entropy) of their frequencies."""
        counts = self.window_counts.double()
        p = counts / counts.sum().clamp(min=1)
        result = {
            "used_codes": (counts > 0).double().mean().item(),
            "perplexity": torch.exp(-torch.special.xlogy(p, p).sum()).item(),
        }
        if reset:
            self.window_counts.zero_()
        return result

    def reset_cluster_size(self) -> None:
        """Forget the usage statistics, as the reference does at the start of every epoch and before evaluation."""
        self.cluster_size.zero_()

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        """Spherical k-means on the first batch of all ranks."""
        if not self.initialized.item():
            everything = F.normalize(_gather_rows(x.float()), dim=-1)
            pick = _sample_rows(len(everything), self.num_codes, torch.Generator().manual_seed(self.seed))
            self.codebook.copy_(everything[pick.to(x.device)])
            counts = torch.zeros_like(self.cluster_size)
            for _ in range(self.kmeans_iterations):
                # With decay 0 the EMA step is the k-means step: codes become the means of their vectors.
                indices = codebook_search(x, self.codebook).indices
                codebook_update(self.codebook, counts, x, indices, decay=0.0)
            self.initialized.fill_(True)
        self._is_initialized = True

    @torch.no_grad()
    def _replace_dead_codes(self, x: Tensor, bins: Tensor) -> None:
        """Every few steps, restart the codes that were idle too long; on no step does the host read the device."""
        self.steps += 1
        self._host_steps = self.steps.item() if self._host_steps is None else self._host_steps + 1
        self.idle.add_(bins.sum()).masked_fill_(bins > 0, 0)
        if self.dead_after <= 0 or self._host_steps % REPLACE_EVERY or not len(x):
            return
        dead = self.idle > self.dead_after * self.num_codes
        fresh = F.normalize(self._sample_batch(x.float()), dim=-1)
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        # As popular as the average code: neither dead again at once, nor a weight that outlives its start.
        self.cluster_size.masked_fill_(dead, 0.0).add_(dead * self.cluster_size.mean())
        self.idle.masked_fill_(dead, 0)

    def _sample_batch(self, x: Tensor) -> Tensor:
        """K rows of the batch of all ranks, the same bits on every rank: [K, D]."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * self._host_steps)
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
        pick = _sample_rows(len(x) * ranks, self.num_codes, generator).to(x.device)
        mine = pick // len(x) == rank
        rows = torch.where(mine[:, None], x[pick % len(x)], 0)
        if ranks > 1:
            dist.all_reduce(rows)  # every row is zero on all ranks but one: the sum is exact
        return rows


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sample_rows(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Indices of ``wanted`` rows: distinct ones if there are enough, otherwise drawn with replacement."""
    if count >= wanted:
        return torch.randperm(count, generator=generator)[:wanted]
    return torch.randint(count, (wanted,), generator=generator)


def _gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order (equally many on each)."""
    if not _distributed():
        return x
    rows = x.new_empty(x.shape[0] * dist.get_world_size(), x.shape[1])
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows
