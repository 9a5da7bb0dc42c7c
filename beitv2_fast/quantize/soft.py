"""Soft assignment of vectors to codes, ``p_ij = softmax_j(s_ij / temperature)``, in memory that N x K does not enter.

``s_ij = <l2(x_i), v_j>`` (cosine), ``-||x_i - v_j||`` (euclidean) or ``<x_i, v_j>`` (dot). Chunks of it exist for a
moment, in the backward once more. All results have gradients for the vectors and for the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..kernels import codebook_search
from ..kernels.checks import METRICS, check_indices, check_vectors
from ..kernels.codebook_search.reference import CHUNK_SCORES, similarities


def soft_assignment(
    x: Tensor, codebook: Tensor, *, metric: str = "cosine", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> (``log sum_j exp(s_ij / temperature)`` [N], ``mean_i p_ij`` [K]).

    The entropy of the mean is a loss against collapse; the cross entropy to codes is ``code_cross_entropy``.
    """
    _check("soft_assignment", x, codebook, metric)

    def chunk(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        logits = _logits(rows, codes, metric, temperature)
        p = logits.softmax(-1)
        top = p.detach().argmax(-1, keepdim=True)  # log p_ij = l_ij - log_sum_exp, of the p that cannot vanish
        return (logits.gather(-1, top) - p.gather(-1, top).log()).squeeze(-1), p.sum(0)

    parts, total = [], codebook.new_zeros(len(codebook), dtype=_wide(x).dtype)
    for log_sum_exp, probabilities in _in_chunks(chunk, len(codebook), _wide(x), codebook=_wide(codebook)):
        parts.append(log_sum_exp)
        total = total + probabilities
    return torch.cat(parts), total / max(1, len(x))


def entropies(
    x: Tensor, codebook: Tensor, *, metric: str = "cosine", temperature: float = 1.0, eps: float = 1e-30
) -> tuple[Tensor, Tensor]:
    """(``mean_i H(p_i)``, ``H(mean_i p_i)``), ``H(p) = -sum_j p_j log p_j``; of the mean ``log (p_j + eps)``.

    The first less the second is the entropy loss of MAGVIT-v2 and IBQ: sure of each vector, all codes in use.
    """
    _check("entropies", x, codebook, metric)

    def chunk(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        logarithms = _logits(rows, codes, metric, temperature).log_softmax(-1)
        p = logarithms.exp()
        return -(p * logarithms).sum(), p.sum(0)

    entropy, p = torch.zeros(2, 1, dtype=_wide(x).dtype, device=x.device)
    for of_chunk, probabilities in _in_chunks(chunk, len(codebook), _wide(x), codebook=_wide(codebook)):
        entropy, p = entropy + of_chunk, p + probabilities / max(1, len(x))
    return entropy.sum() / max(1, len(x)), -(p * (p + eps).log()).sum()  # the logarithm of 0 has no gradient


class _Backpropagation(torch.autograd.Function):
    """See ``index_backpropagation``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x, codebook, indices)
        ctx.temperature = temperature
        return codebook[indices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, codebook, indices = ctx.saved_tensors
        by_x, by_codebook = [], torch.zeros_like(codebook).index_add_(0, indices, grad)
        size = max(1, CHUNK_SCORES // len(codebook))
        for rows, upstream in zip((x / ctx.temperature).split(size), grad.split(size), strict=True):
            p = (rows @ codebook.T).softmax(-1)
            by_logits = torch.ops.aten._softmax_backward_data(upstream @ codebook.T, p, -1, p.dtype)
            by_x.append(by_logits @ codebook / ctx.temperature)
            by_codebook.addmm_(by_logits.T, rows)
        return torch.cat(by_x), by_codebook, None, None


def index_backpropagation(x: Tensor, codebook: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> (``v_k`` [N, D], the index k [N] int64 of the largest ``<x_i, v_k>``).

    Its gradient is that of ``sum_j o_ij v_j`` with ``o_i = onehot(k) + p_i - sg(p_i)``, ``p_i = softmax_j(<x_i, v_j> /
    temperature)``: every code gets one, not only those that were chosen (IBQ, arXiv 2412.02692 section 3). For cosine
    normalize both.
    """
    _check("index_backpropagation", x, codebook, "dot")
    indices = codebook_search(x, codebook).indices
    quantized: Tensor = _Backpropagation.apply(_wide(x), _wide(codebook), indices, temperature)
    return quantized, indices


def code_cross_entropy(
    x: Tensor, codebook: Tensor, codes: Tensor, *, metric: str = "cosine", temperature: float = 1.0
) -> Tensor:
    """``mean_i -log p_i,codes_i`` over the vectors whose code [N] int64 is not -1; 0 if there is none."""
    _check("code_cross_entropy", x, codebook, metric)
    check_indices("code_cross_entropy", codes, len(x))

    def chunk(rows: Tensor, wanted: Tensor, book: Tensor) -> Tensor:
        logits = _logits(rows, book, metric, temperature)
        return F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")

    losses = _in_chunks(chunk, len(codebook), _wide(x), codes, codebook=_wide(codebook))
    return torch.stack([*losses]).sum() / (codes >= 0).sum().clamp(min=1)


def diversity_loss(x: Tensor, codebooks: Tensor, *, metric: str, temperature: float) -> Tensor:
    """Minus the entropy of the mean ``p`` over heads and batch, averaged over places: x [P, G, B, D], codes [G, K, D].

    As vector-quantize-pytorch's, whose logarithm is of at least 1e-5.
    """

    def chunk(rows: Tensor, books: Tensor) -> Tensor:
        each = [_logits(rows[:, g].flatten(0, 1), book, metric, temperature) for g, book in enumerate(books)]
        p = torch.stack(each).softmax(-1).unflatten(1, (len(rows), -1)).mean((0, 2))  # [places, K]
        loss: Tensor = (p * p.clamp(min=1e-5).log()).sum(-1)
        return loss

    scores = codebooks.shape[:2].numel() * x.shape[2]  # of one place
    return torch.cat([*_in_chunks(chunk, scores, _wide(x), codebook=_wide(codebooks))]).mean()


def _check(op: str, x: Tensor, codebook: Tensor, metric: str) -> None:
    if metric not in (*METRICS, "dot"):
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, dot; got {metric!r}")
    check_vectors(op, x, codebook)


def _logits(x: Tensor, codebook: Tensor, metric: str, temperature: float) -> Tensor:
    if metric == "euclidean":
        return similarities(x, codebook, metric) / temperature
    return (F.normalize(x, dim=-1) if metric == "cosine" else x) / temperature @ codebook.T  # divides N D, not N K


def _in_chunks(chunk: Callable[..., Any], scores: int, *rows: Tensor, codebook: Tensor) -> Iterator[Any]:
    """Results of ``chunk`` for some rows after others, each row of so many ``scores``."""
    size = max(1, CHUNK_SCORES // scores)
    for part in zip(*(t.split(size) for t in rows), strict=True):
        yield checkpoint(chunk, *part, codebook, use_reentrant=False, preserve_rng_state=False)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
