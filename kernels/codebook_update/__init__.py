"""codebook_update: the EMA step of a vector quantiser's codebook, by scatter, in place."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_indices, check_metric, check_vectors
from .reference import batch_statistics_reference, ema_average_reference, norm_ema_reference


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
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Move every code towards the mean of the vectors that chose it. ``codebook`` and ``cluster_size`` change in place.

    With ``bins_j`` the number of vectors that chose code j and ``sum_j`` their sum, both over all ranks:

    - without ``embed_avg`` (BEiT v2): ``mean_j = l2(sum_j / bins_j)`` where bins_j > 0, else the old v_j;
      ``v_j <- l2(decay v_j + (1 - decay) mean_j)``.
    - with ``embed_avg`` [K, D] (VQ-VAE, appendix A.1): ``embed_avg_j <- decay embed_avg_j + (1 - decay) sum_j``;
      ``v_j <- embed_avg_j / n_j``, n the Laplace-smoothed cluster size; l2-normalised for cosine.

    In both, ``cluster_size <- decay cluster_size + (1 - decay) bins``.

    The sums are accumulated in fixed point, so the result is the same bits whatever the order of the rows and however
    the batch is split over ranks. Vectors with NaN or Inf are not counted.

    Args:
        codebook: [K, D] fp32. cluster_size: [K] fp32.
        x: [N, D] vectors; for cosine they are l2-normalised first. indices: [N] int64 in 0..K-1.
        decay: of the moving averages, in [0, 1]. eps: of the Laplace smoothing.
        process_group: ranks whose statistics are summed; the default group when torch.distributed is initialised.

    Returns:
        bins [K] int64: how often each code was chosen, over all ranks.

    Source: arXiv 2208.06366 section 2.2; arXiv 1711.00937 appendix A.1.
    """
    check_metric(metric)
    check_vectors("codebook_update", x, codebook)
    check_indices("codebook_update", indices, x.shape[0])
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"codebook_update: decay must lie in [0, 1]; got {decay}")
    if metric == "euclidean" and embed_avg is None:
        raise ValueError("codebook_update: metric='euclidean' needs embed_avg, the moving average of the sums [K, D]")
    statistics = batch_statistics_reference(x, indices, codebook.shape[0], metric)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(statistics, group=process_group)
    if embed_avg is None:
        return norm_ema_reference(codebook, cluster_size, statistics, decay)
    return ema_average_reference(codebook, cluster_size, embed_avg, statistics, decay, metric, eps)
