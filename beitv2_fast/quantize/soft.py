"""Soft assignment of vectors to codes, ``p_ij = softmax_j(s_ij / temperature)``, in memory that N x K does not enter.

``s_ij = <l2(x_i), v_j>`` (cosine) or ``-||x_i - v_j||`` (euclidean). Chunks of it exist for a moment, in the backward
once more. All results have gradients for the vectors and for the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.checks import check_indices, check_metric, check_vectors
from ..kernels.codebook_search.reference import CHUNK_SCORES, similarities


def soft_assignment(
    x: Tensor, codebook: Tensor, *, metric: str = "cosine", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> (``log sum_j exp(s_ij / temperature)`` [N], ``mean_i p_ij`` [K]).

    The entropy of the mean is a loss against collapse; the cross entropy to codes is ``code_cross_entropy``.
    """
    check_metric(metric)
    check_vectors("soft_assignment", x, codebook)

    def chunk(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        logits = similarities(rows, codes, metric) / temperature
        return logits.logsumexp(-1), logits.softmax(-1).sum(0)

    parts, total = [], codebook.new_zeros(len(codebook), dtype=_wide(x).dtype)
    for log_sum_exp, probabilities in _in_chunks(chunk, len(codebook), _wide(x), codebook=_wide(codebook)):
        parts.append(log_sum_exp)
        total = total + probabilities
    return torch.cat(parts), total / max(1, len(x))


def code_cross_entropy(
    x: Tensor, codebook: Tensor, codes: Tensor, *, metric: str = "cosine", temperature: float = 1.0
) -> Tensor:
    """``mean_i -log p_i,codes_i`` over the vectors whose code [N] int64 is not -1; 0 if there is none."""
    check_metric(metric)
    check_vectors("code_cross_entropy", x, codebook)
    check_indices("code_cross_entropy", codes, len(x))

    def chunk(rows: Tensor, wanted: Tensor, book: Tensor) -> Tensor:
        logits = similarities(rows, book, metric) / temperature
        return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")

    losses = _in_chunks(chunk, len(codebook), _wide(x), codes, codebook=_wide(codebook))
    return torch.stack([*losses]).sum() / (codes >= 0).sum().clamp(min=1)


def dot_assignment(x: Tensor, codebook: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``p_ij = softmax_j(<x_i, v_j> / temperature)``: the entropies of its rows [N], their mean [K], and the codes
    that are meant, ``sum_j p_ij sg(v_j)`` [N, D]."""

    def chunk(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = (rows @ codes.T / temperature).log_softmax(-1)
        p = log_p.exp()
        return -(p * log_p).sum(-1), p.sum(0), p @ codes.detach()

    entropies, means, total = [], [], torch.zeros_like(_wide(codebook[:, 0]))
    for entropy, probabilities, mean in _in_chunks(chunk, len(codebook), _wide(x), codebook=_wide(codebook)):
        entropies.append(entropy)
        means.append(mean)
        total = total + probabilities
    return torch.cat(entropies), total / max(1, len(x)), torch.cat(means)


def diversity_loss(x: Tensor, codebooks: Tensor, *, metric: str, temperature: float) -> Tensor:
    """Minus the entropy of the mean ``p`` over heads and batch, averaged over places: x [P, G, B, D], codes [G, K, D].

    As vector-quantize-pytorch's, whose logarithm is of at least 1e-5.
    """

    def chunk(rows: Tensor, books: Tensor) -> Tensor:
        each = [similarities(rows[:, g].flatten(0, 1), book, metric) / temperature for g, book in enumerate(books)]
        p = torch.stack(each).softmax(-1).unflatten(1, (len(rows), -1)).mean((0, 2))  # [places, K]
        loss: Tensor = (p * p.clamp(min=1e-5).log()).sum(-1)
        return loss

    scores = codebooks.shape[:2].numel() * x.shape[2]  # of one place
    return torch.cat([*_in_chunks(chunk, scores, _wide(x), codebook=_wide(codebooks))]).mean()


def _in_chunks(chunk: Callable[..., Any], scores: int, *rows: Tensor, codebook: Tensor) -> Iterator[Any]:
    """Results of ``chunk`` for some rows after others, each row of so many ``scores``."""
    size = max(1, CHUNK_SCORES // scores)
    for part in zip(*(t.split(size) for t in rows), strict=True):
        yield checkpoint(chunk, *part, codebook, use_reentrant=False, preserve_rng_state=False)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
