"""Soft assignment of vectors to codes, ``p_ij = softmax_j(s_ij / temperature)``, in memory that N x K does not enter.

``s_ij = <l2(x_i), v_j>`` (cosine), ``-||x_i - v_j||`` (euclidean) or ``<x_i, v_j>`` (dot). All results have gradients
for the vectors and for the codebook; these have none of their own, and asking for one is an error. Scores exist a chunk
of rows at a time. ``code_cross_entropy`` and ``diversity_loss`` compute their gradients with their values, in 6 N K D
FLOPs; what else there is, and the diversity of places of more rows than a chunk, computes scores twice, in 8 N K D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import codebook_search
from ..kernels.checks import METRICS, check_indices, check_range, check_temperature, check_vectors
from ..kernels.codebook_search.reference import CHUNK_SCORES, NEAREST
from ..kernels.registration import custom_op

IN_CACHE = 1 << 18  # scores of a chunk on the CPU, or K D if those are more
LEAST = 1e-5  # probability of which the logarithm is taken


def soft_assignment(
    x: Tensor, codebook: Tensor, *, metric: str = "cosine", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> (``log sum_j exp(s_ij / temperature)`` [N], ``mean_i p_ij`` [K]).

    The entropy of the mean is a loss against collapse; the cross entropy to codes is ``code_cross_entropy``.
    """
    check_vectors("soft_assignment", x, codebook)
    log_sum_exp, _, p = _assign(*_operands("soft_assignment", x, codebook, metric, temperature))
    return log_sum_exp, p


def entropies(
    x: Tensor, codebook: Tensor, *, metric: str = "cosine", temperature: float = 1.0, eps: float = 1e-30
) -> tuple[Tensor, Tensor]:
    """(``mean_i H(p_i)``, ``H(mean_i p_i)``), ``H(p) = -sum_j p_j log p_j``; of the mean ``log (p_j + eps)``.

    The first less the second is the entropy loss of MAGVIT-v2 and IBQ: sure of each vector, all codes in use.
    """
    check_vectors("entropies", x, codebook)
    _, entropy, p = _assign(*_operands("entropies", x, codebook, metric, temperature))
    # Divided before they are added: 0 of no vectors, in programs for any number of them, too. log 0 has no gradient.
    return (entropy / x.shape[0]).sum(), -(p * (p + eps).log()).sum()


class _Backpropagation(torch.autograd.Function):
    """See ``index_backpropagation``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, codebook, indices)
        return codebook[indices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, codebook, indices = ctx.saved_tensors
        by_x, by_codebook = _assign_backward(x, codebook, 0.0, None, None, None, grad, True)
        return by_x, by_codebook.index_add(0, indices, grad), None


def index_backpropagation(x: Tensor, codebook: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> (``v_k`` [N, D], the index k [N] int64 of the largest ``<x_i, v_k>``).

    Its gradient is that of ``sum_j o_ij v_j`` with ``o_i = onehot(k) + p_i - sg(p_i)``, ``p_i = softmax_j(<x_i, v_j> /
    temperature)``: every code gets one, not only those that were chosen (IBQ, arXiv 2412.02692 section 3). For cosine
    normalize both.
    """
    check_vectors("index_backpropagation", x, codebook)
    rows, codes, _ = _operands("index_backpropagation", x, codebook, "dot", temperature)
    indices = codebook_search(x, codebook).indices
    quantized: Tensor = _Backpropagation.apply(rows, codes, indices)
    return quantized, indices


def code_cross_entropy(
    x: Tensor, codebook: Tensor, codes: Tensor, *, metric: str = "cosine", temperature: float = 1.0
) -> Tensor:
    """``mean_i -log p_i,codes_i`` over the vectors whose code [N] int64 is not -1; 0 if there is none.

    Any other code outside 0..K-1 is an IndexError on the CPU; on a GPU, for which nobody waits, a failed assertion.
    """
    check_vectors("code_cross_entropy", x, codebook)
    check_indices("code_cross_entropy", codes, x.shape[0])
    none = (codes < 0)[:, None]
    rows, book, floor = _operands("code_cross_entropy", x.masked_fill(none, 0), codebook, metric, temperature)
    rows = rows.masked_fill(none, 0)  # the codes' gradient is a product with these
    return _loss(_cross_entropy, rows, book, codes, floor) / (codes >= 0).sum().clamp(min=1)


def diversity_loss(x: Tensor, codebooks: Tensor, *, metric: str, temperature: float) -> Tensor:
    """Minus the entropy of the mean ``p`` over heads and batch, averaged over places: x [P, G, B, D], codes [G, K, D].

    As vector-quantize-pytorch's, whose logarithm is of at least 1e-5. Of nothing it is 0.
    """
    rows = x.transpose(0, 1).flatten(1, 2)  # [G, P B, D]
    a, b, floor = _operands("diversity_loss", rows, codebooks, metric, temperature)
    return _loss(_diversity, a, b, x.shape[2], floor)


def _operands(op: str, x: Tensor, codebook: Tensor, metric: str, temperature: float) -> tuple[Tensor, Tensor, float]:
    """a [..., N, E] and b [..., K, E] whose product is the logits (floor 0), or the squares of the logits, at least
    ``floor``, of which these are minus the root."""
    if metric not in (*METRICS, "dot"):
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, dot; got {metric!r}")
    check_temperature(op, temperature)
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    x, codebook = x.to(dtype), codebook.to(dtype)
    if metric == "euclidean":  # |x|^2 - 2 <x, v> + |v|^2
        a = torch.cat([x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1) / temperature**2
        squares = codebook.square().sum(-1, keepdim=True)
        return a, torch.cat([-2 * codebook, torch.ones_like(squares), squares], -1), NEAREST / temperature**2
    return (F.normalize(x, dim=-1) if metric == "cosine" else x) / temperature, codebook, 0.0


def _chunk(codes: int, width: int, device: torch.device) -> int:
    """How many rows have their scores computed at a time: as many as fit, or as take what the codebook takes."""
    most = min(CHUNK_SCORES, IN_CACHE) if device.type == "cpu" else CHUNK_SCORES
    return max(1, width, most // codes)


def _chunks(a: Tensor, b: Tensor, floor: float, others: int) -> Iterator[Any]:
    """The rows of a chunk, their logits [n, K], and as many ``others`` of that size, not filled; all used again."""
    size = _chunk(len(b), b.shape[1], b.device)
    buffers = [b.new_empty(min(size, len(a)), len(b)) for _ in range(1 + others)]
    for start in range(0, len(a), size):
        part = slice(start, start + size)
        logits, *rest = (buffer[: len(a[part])] for buffer in buffers)
        yield part, _logits(a[part], b, floor, logits), *rest


def _like(t: Tensor, wanted: bool = True) -> Tensor:
    return t.new_empty(t.shape if wanted else 0)


def _logits(a: Tensor, b: Tensor, floor: float, out: Tensor) -> Tensor:
    torch.mm(a, b.T, out=out)
    return out.clamp_(min=floor).sqrt_().neg_() if floor else out


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Into ``out``; returns the largest logits and how far the log-sum-exp lies above them, [N, 1]."""
    torch.softmax(logits, -1, out=out)
    return logits.amax(-1, keepdim=True), -out.amax(-1, keepdim=True).log()  # of the p that cannot vanish


def _softmax_backward_(upstream: Tensor, p: Tensor) -> None:
    """Of contiguous tensors; in place in others torch writes wrong numbers."""
    torch.ops.aten._softmax_backward_data(upstream, p, -1, p.dtype, grad_input=upstream)


def _add_gradients(
    by_logits: Tensor, logits: Tensor, a: Tensor, b: Tensor, floor: float, by_a: Tensor, by_b: Tensor
) -> None:
    """The gradients of a chunk: by its rows into by_a, by b added to by_b if that is not empty. The logits go."""
    if floor:  # the derivative of -sqrt(s) is -1 / (2 sqrt(s)), and 0 at the floor, found up to rounding
        roots = logits.neg_()
        torch.ops.aten.threshold_backward(by_logits, roots, 1.00001 * floor**0.5, grad_input=by_logits)
        by_logits.div_(roots.mul_(-2))
    torch.mm(by_logits, b, out=by_a)
    if by_b.numel():
        by_b.addmm_(by_logits.T, a)


@custom_op("beitv2_fast::soft_assignment")
def _assign(a: Tensor, b: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp [N], entropy [N], mean p [K]) of the logits of ``_operands``."""
    log_sum_exp, entropy, total = a.new_empty(len(a)), a.new_empty(len(a)), b.new_zeros(len(b))
    for part, logits, p in _chunks(a, b, floor, 1):
        top, above = _softmax(logits, p)
        log_sum_exp[part] = (top + above)[:, 0]
        total += p.sum(0)
        entropy[part] = above[:, 0] - logits.sub_(top).mul_(p).sum(-1)
    return log_sum_exp, entropy, total / max(1, len(a))


@_assign.register_fake
def _assign_fake(a: Tensor, b: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape[0]), a.new_empty(a.shape[0]), b.new_empty(b.shape[0])


@custom_op("beitv2_fast::soft_assignment_backward")
def _assign_backward(
    a: Tensor,
    b: Tensor,
    floor: float,
    by_log_sum_exp: Tensor | None,  # [N]
    by_entropy: Tensor | None,  # [N]
    by_p: Tensor | None,  # [K], by the mean
    by_code: Tensor | None,  # [N, E], by sum_j p_ij b_j of constant b, without the entropy's
    of_b: bool,
) -> tuple[Tensor, Tensor]:
    by_a, by_b = _like(a), _like(b, of_b).zero_()
    by_p = None if by_p is None else by_p / max(1, len(a))
    for part, logits, p, by in _chunks(a, b, floor, 2):
        torch.softmax(logits, -1, out=p)
        if by_code is not None:
            torch.mm(by_code[part], b.T, out=by)
        elif by_entropy is not None:  # of -sum_j p_j log p_j; what all j share has no gradient
            torch.mul(logits, -by_entropy[part, None], out=by)
        else:
            by.zero_()
        if by_p is not None:
            by += by_p
        _softmax_backward_(by, p)
        if by_log_sum_exp is not None:
            by.addcmul_(p, by_log_sum_exp[part, None])
        _add_gradients(by, logits, a[part], b, floor, by_a[part], by_b)
    return by_a, by_b


@_assign_backward.register_fake
def _assign_backward_fake(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(a), _like(b, rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.floor = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands)


def _gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    of_b = ctx.needs_input_grad[1]
    by_a, by_b = _assign_backward(*ctx.saved_tensors, ctx.floor, *upstream, None, of_b)
    return by_a, by_b if of_b else None, None


_assign.register_autograd(_gradients, setup_context=_save)


@custom_op("beitv2_fast::soft_cross_entropy")
def _cross_entropy(
    a: Tensor, b: Tensor, codes: Tensor, floor: float, gradients: bool, of_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i -log p_codes_i`` [1] and its gradients by rows a [N, E] and codebook b [K, E], empty if not wanted."""
    if codes.device.type == "cpu":
        check_range("code_cross_entropy", codes, len(b))
    loss, by_a, by_b = b.new_zeros(1), _like(a, gradients), _like(b, of_b).zero_()
    for part, logits, p in _chunks(a, b, floor, 1):
        top, above = _softmax(logits, p)
        wanted = codes[part, None].clamp(min=0)
        loss += (top - logits.gather(1, wanted) + above).masked_fill(codes[part, None] < 0, 0).sum()
        if gradients:
            by = p.scatter_(1, wanted, p.gather(1, wanted) - 1)
            _add_gradients(by, logits, a[part], b, floor, by_a[part], by_b)
    return loss, by_a, by_b


@custom_op("beitv2_fast::soft_diversity")
def _diversity(
    a: Tensor, b: Tensor, batch: int, floor: float, gradients: bool, of_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [1] over places of ``sum p log p``, p the means over G and the ``batch`` rows of a place, of a [G, N, E]
    and b [G, K, E], and its gradients by both, empty if not wanted. A chunk holds whole places; where not even one
    fits, its gradient comes after its last chunk, of softmaxes computed once more."""
    (groups, n, _), count = a.shape, b.shape[1]
    loss, by_a, by_b = b.new_zeros(1), _like(a, gradients), _like(b, of_b).zero_()
    size = _chunk(groups * count, b.shape[2], b.device)
    most = max(1, size // max(1, batch)) * batch  # rows of the places at a time
    buffers = [b.new_empty(groups, min(size, most, n), count) for _ in range(3)]

    def softmax(part: slice) -> list[Tensor]:
        logits, p, by = (buffer[:, : part.stop - part.start] for buffer in buffers)
        for g in range(groups):
            torch.softmax(_logits(a[g, part], b[g], floor, logits[g]), -1, out=p[g])
        return [logits, p, by]

    for first in range(0, n, max(1, most)):
        last = min(first + most, n)
        parts = [slice(start, min(start + size, last)) for start in range(first, last, size)]
        mean = b.new_zeros((last - first) // batch, count)
        for part in parts:
            logits, p, by = softmax(part)
            mean += p.unflatten(1, (len(mean), -1)).sum((0, 2)) / (groups * batch)
        logarithms = mean.clamp(min=LEAST).log()
        loss += (mean * logarithms).sum() * (batch / n)
        upstream = (logarithms + (mean >= LEAST)) / (groups * n)
        for part in parts if gradients else ():
            if len(parts) > 1:
                logits, p, by = softmax(part)
            by.unflatten(1, (len(mean), -1)).copy_(upstream[:, None])
            for g in range(groups):
                _softmax_backward_(by[g], p[g])
                _add_gradients(by[g], logits[g], a[g, part], b[g], floor, by_a[g, part], by_b[g] if of_b else by_b)
    return loss, by_a, by_b


def _losses_fake(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, gradients, of_b = rest
    return b.new_empty(1), _like(a, gradients), _like(b, of_b)


@custom_op("beitv2_fast::soft_losses_backward")
def _losses_backward(upstream: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
    """The product; ``of`` is what the gradient depends on: differentiating twice is an error, not a wrong number."""
    return upstream * gradient


@_losses_backward.register_fake
def _losses_backward_fake(upstream: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], *output[1:])


def _known_gradients(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    a, b, *known = ctx.saved_tensors
    wanted = zip(ctx.needs_input_grad, known, (a, b), strict=False)
    return *(_losses_backward(upstream, by, of) if needed else None for needed, by, of in wanted), *[None] * 4


for _op in (_cross_entropy, _diversity):
    _op.register_fake(_losses_fake)
    _op.register_autograd(_known_gradients, setup_context=_save_gradients)


def _loss(op: Any, a: Tensor, b: Tensor, of: Tensor | int, floor: float) -> Tensor:
    of_a, of_b = (torch.is_grad_enabled() and t.requires_grad for t in (a, b))
    loss: Tensor = op(a, b, of, floor, of_a or of_b, of_b)[0]
    return loss.squeeze(0)
