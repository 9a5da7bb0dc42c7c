"""codebook_update: the EMA step of a vector quantizer's codebook, by scatter, in place."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_indices, check_metric, check_vectors
from .dead_codes import find_dead, restart_dead_codes
from .ops import check_state, count_uses, ema_step


@torch.no_grad()
def codebook_update(
    codebook: Tensor,
    cluster_size: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float = 0.99,
    metric: str = "cosine",
    embed_avg: Tensor | None = None,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | str | None = None,
    idle: Tensor | None = None,
    dead_after: float = 0.0,
    dead_below: float = 0.0,
    restart_seed: int | None = None,
) -> Tensor:
    """Move every code towards the mean of the vectors that chose it. All state given changes in place.

    With ``bins_j`` the number of vectors that chose code j and ``sum_j`` their sum, both over all ranks:

    - without ``embed_avg`` (BEiT v2): ``mean_j = l2(sum_j / bins_j)`` where bins_j > 0, else the old v_j;
      ``v_j <- l2(decay v_j + (1 - decay) mean_j)``.
    - with ``embed_avg`` (VQ-VAE, appendix A.1): ``embed_avg_j <- decay embed_avg_j + (1 - decay) sum_j``;
      ``v_j <- embed_avg_j / n_j`` with the smoothed cluster size ``n_j = (c_j + eps) / (C + K eps) * C``,
      ``C = sum_j c_j``; l2-normalized for cosine. A code with n_j = 0 stays.

    In both, ``cluster_size: c <- decay c + (1 - decay) bins``.

    Dead codes, if ``restart_seed`` is given: codes with ``c_j < dead_below``, or idle for more than ``dead_after``
    vectors, restart at vectors of the batch, with all of their state (see ``restart_dead_codes``), the same on every
    rank that is given the same seed.

    Bit-reproducible: the state after the call is the same bits whatever the number of threads, the instruction set,
    the order of the rows and the split of the batch over ranks (which vectors are drawn for restarts depends on the
    number of a row in the whole batch). The sums are integers: multiples of 2^-36 for cosine, exact to 2^27 vectors
    per code; multiples of 2^-40 for euclidean, exact to 2^27 vectors and |x| < 2^32. Ranks do one all-reduce of one
    int64 buffer, [K, 1 + D] for cosine and [K, 1 + 2 D] for euclidean; restarts also exchange what they draw, [K, D].

    Not counted: vectors with NaN or Inf (or |x| >= 2^32 for euclidean), and vectors with index -1, which marks padding.
    Any other index outside 0..K-1 raises on the CPU. On a GPU nothing checks it, which would make the host wait: such a
    vector is not counted, and with TRITON_DEBUG=1 it trips an assertion.

    Args:
        codebook: [K, D] fp32.
        cluster_size: [K] fp32.
        x: [N, D] vectors, any float dtype and strides, N >= 0, computed from fp32; l2-normalized first for cosine.
        indices: [N] int64 in 0..K-1, or -1.
        decay: of the moving averages, in [0, 1].
        embed_avg: [K, D] fp32, the moving average of the sums; required for euclidean.
        eps: of the smoothing of cluster sizes; 0 for none.
        process_group: ranks whose statistics are summed, or the name of their group ("": this rank by itself); the
            default group when torch.distributed is initialized.
        idle: [K] int64, how many vectors were seen since a code was last chosen; kept up to date.

    Returns:
        bins [K] int64: how often each code was chosen, over all ranks.

    Raises:
        ValueError, TypeError, IndexError: naming what does not fit.

    Source: arXiv 2208.06366 section 2.2; arXiv 1711.00937 appendix A.1.
    """
    check_metric(metric)
    check_vectors("codebook_update", x, codebook)
    check_indices("codebook_update", indices, x.shape[0])
    check_state(codebook, cluster_size=cluster_size, embed_avg=embed_avg, idle=idle)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"codebook_update: decay must lie in [0, 1]; got {decay}")
    if eps < 0 or dead_after < 0 or dead_below < 0:
        raise ValueError(
            f"codebook_update: eps, dead_after and dead_below must be >= 0; got {eps}, {dead_after} and {dead_below}"
        )
    if metric == "euclidean" and embed_avg is None:
        raise ValueError("codebook_update: metric='euclidean' needs embed_avg, the moving average of the sums [K, D]")
    if dead_after > 0 and idle is None:
        raise ValueError("codebook_update: dead_after needs idle, an int64 buffer [K] that counts idle vectors")
    bins = ema_step(codebook, cluster_size, embed_avg, x, indices, decay, metric, eps, process_group)
    if idle is not None:
        count_uses(bins, idle)
    if restart_seed is not None:
        dead = find_dead(cluster_size, idle, dead_after, dead_below)
        state = (codebook, cluster_size, embed_avg, idle)
        restart_dead_codes(
            dead, x, *state, metric=metric, salt=restart_seed, least_size=dead_below, process_group=process_group
        )
    return bins
