"""The head's losses and gradients, chunk by chunk over the masked tokens: one chunk of logits exists at a time.

    hidden = LayerNorm(tokens[chunk]); logits = hidden W^T + c              2 C V FLOPs a token
    losses, logits <- softmax(logits) - one_hot(labels)                     in place, by the device's kernel
    dhidden = logits W; dW += logits^T hidden; dtokens = LayerNorm'(dhidden)    4 C V FLOPs a token

A loss function's gradient can be had in the forward pass, up to the upstream factor, which is a scalar for each branch.
So no logit is kept or computed twice: 6 M C V FLOPs, as with all logits in memory (computing them again in the backward
pass costs 8, or 10 when dW and dtokens each do). The memory is the gradients and one chunk. The matrix products bound
the time on every device, and the libraries' are the fastest there are, so they do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gather import rows_at


class Head(NamedTuple):
    """LayerNorm and linear layer: norm_weight, norm_bias [C]; weight [V, C]; bias [V] or None."""

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    weight: Tensor
    bias: Tensor | None


class Wanted(NamedTuple):
    """Which gradients to compute: of the tokens, of the LayerNorm's parameters, of the linear layer's."""

    tokens: bool
    norm: bool
    head: bool


class Device(NamedTuple):
    """What differs between devices.

    softmax_: ``(logits [R, V], bias, labels, losses, correct, gradient, grad_bias) -> None``: see softmax_reference_.
    chunk_logits: logits in a chunk. widen: compute low-precision products in fp32 (of rounded operands: the products
    are exact, and the sums better). loss: the losses alone, without logits in memory, or None.
    """

    softmax_: Callable[..., None]
    chunk_logits: int
    widen: bool = False
    loss: Callable[..., None] | None = None


class Results(NamedTuple):
    """losses, correct [branches]; the gradients of M times each loss, [branches, ...], of size 0 if not wanted.

    The factor M keeps them in the range of fp16; with_gradient divides by it.
    """

    losses: Tensor
    correct: Tensor
    grad_rows: Tensor  # [branches, M, C]
    grad_norm: Tensor  # [branches, 2, C]
    grad_weight: Tensor  # [branches, V, C]
    grad_bias: Tensor  # [branches, V]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(
    branches: Sequence[Tensor], positions: Tensor, head: Head, dtype: torch.dtype, wanted: Wanted
) -> Results:
    """Results whose gradients are zero; losses and correct are of the rows: [branches, M]."""
    count, rows, (classes, dim) = len(branches), positions.shape[0], head.weight.shape
    wide = accumulation_dtype(dtype)

    def zeros(when: bool, *shape: int) -> Tensor:
        return branches[0].new_zeros((count, *shape) if when else 0, dtype=wide)

    return Results(
        zeros(True, rows),
        branches[0].new_zeros((count, rows), dtype=torch.bool),
        zeros(wanted.tokens, rows, dim),
        zeros(wanted.norm, 2, dim),
        zeros(wanted.head, classes, dim),
        zeros(wanted.head and head.bias is not None, classes),
    )


def head_losses(
    branches: Sequence[Tensor],
    positions: Tensor,
    labels: Tensor,
    head: Head,
    dtype: torch.dtype,
    wanted: Wanted,
    device: Device,
) -> Results:
    """Everything the op returns. dtype: of the matrix products' operands."""
    out = empty_results(branches, positions, head, dtype, wanted)
    wide = accumulation_dtype(dtype)
    multiply = wide if device.widen else dtype
    weight = head.weight.to(dtype).to(multiply)
    prepared = Head(
        head.norm_weight.to(wide),
        head.norm_bias.to(wide),
        head.eps,
        weight,
        None if head.bias is None else head.bias.to(wide),
    )
    rows, classes = len(positions), len(weight)
    size = max(min(max(device.chunk_logits // classes, 128), rows), 1)
    fused = device.loss is not None and not any(wanted)
    buffer = weight.new_empty(0 if fused else size, classes)
    for b, tokens in enumerate(branches):
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            x = rows_at(tokens, positions[chunk]).to(wide)
            hidden, mean, rstd = torch.native_layer_norm(
                x, x.shape[1:], prepared.norm_weight, prepared.norm_bias, head.eps
            )
            hidden = hidden.to(dtype).to(multiply)
            if fused:
                device.loss(hidden, weight, prepared.bias, labels[chunk], out.losses[b, chunk], out.correct[b, chunk])
                continue
            logits = torch.mm(hidden, weight.t(), out=buffer[: len(x)])
            grad_bias = out.grad_bias[b] if out.grad_bias.numel() else None
            device.softmax_(
                logits,
                prepared.bias,
                labels[chunk],
                out.losses[b, chunk],
                out.correct[b, chunk],
                any(wanted),
                grad_bias,
            )
            if wanted.head:
                _add_product(out.grad_weight[b], logits.t(), hidden)
            if wanted.tokens or wanted.norm:
                grad_x, grad_gamma, grad_beta = torch.ops.aten.native_layer_norm_backward(
                    torch.mm(logits, weight).to(wide),
                    x,
                    x.shape[1:],
                    mean,
                    rstd,
                    prepared.norm_weight,
                    prepared.norm_bias,
                    [wanted.tokens, wanted.norm, wanted.norm],
                )
                if wanted.tokens:
                    out.grad_rows[b, chunk] = grad_x
                if wanted.norm:
                    out.grad_norm[b] += torch.stack([grad_gamma, grad_beta])
    return out._replace(losses=out.losses.sum(1) / max(rows, 1), correct=out.correct.sum(1))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b: one product a chunk is rounded to a low dtype, its sum over chunks is not."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b))


def softmax_reference_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    gradient: bool,
    grad_bias: Tensor | None,
) -> None:
    """Cross entropy of logits + bias into losses [R] and correct [R]; with ``gradient``, softmax - one_hot replaces the
    logits and its column sums are added to grad_bias [V]."""
    wide = logits if logits.dtype == losses.dtype else logits.to(losses.dtype)
    if bias is not None:
        wide += bias
    target = labels[:, None]
    torch.sub(wide.logsumexp(1), wide.gather(1, target)[:, 0], out=losses)
    correct.copy_((wide.argmax(1) == labels) & ~losses.isnan())
    if gradient:
        torch.softmax(wide, 1, out=wide)
        wide.scatter_add_(1, target, -torch.ones_like(wide[:, :1]).expand_as(target))
        if grad_bias is not None:
            grad_bias += wide.sum(0)
        if wide is not logits:
            logits.copy_(wide)
