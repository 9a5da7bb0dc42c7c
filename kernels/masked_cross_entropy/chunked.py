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

from . import steps


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

    chunk_logits: logits in a chunk. softmax_, normalize, normalize_backward: see steps.py. widen: compute low-precision
    products in fp32 (of rounded operands: each product is exact, and so are more of the sums' digits). loss: the losses
    alone, without logits in memory: ``(hidden, weight, bias, labels, losses, correct)``, or None.
    """

    chunk_logits: int
    softmax_: Callable[..., None] = steps.softmax_
    normalize: Callable[..., steps.Normalized] = steps.normalize
    normalize_backward: Callable[..., None] = steps.normalize_backward
    widen: bool = False
    loss: Callable[..., None] | None = None


class Results(NamedTuple):
    """losses, correct [branches]; the gradients of M times each loss, [branches, ...], of size 0 if not wanted.

    The factor M keeps them in the range of fp16; with_gradient divides by it. Each branch's rows are a tensor of their
    own: the backward pass frees them as soon as they have become that branch's gradient.
    """

    losses: Tensor
    correct: Tensor
    grad_rows: list[Tensor]  # branches x [M, C]
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
        return branches[0].new_zeros(shape if when else 0, dtype=wide)

    return Results(
        zeros(True, count, rows),
        branches[0].new_zeros((count, rows), dtype=torch.bool),
        [zeros(True, rows, dim) for _ in branches if wanted.tokens],
        zeros(wanted.norm, count, 2, dim),
        zeros(wanted.head, count, classes, dim),
        zeros(wanted.head and head.bias is not None, count, classes),
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
    gamma, beta, weight = head.norm_weight.to(wide), head.norm_bias.to(wide), head.weight.to(dtype).to(multiply)
    bias = None if head.bias is None else head.bias.to(wide).contiguous()
    positions, labels = positions.contiguous(), labels.contiguous()  # kernels read them, and the bias, one by one
    rows, classes = len(positions), len(weight)
    fused = device.loss is not None and not any(wanted)
    size = max(rows if fused else min(max(device.chunk_logits // classes, 128), rows), 1)
    buffer = weight.new_empty(0 if fused else size, classes)
    for b, tokens in enumerate(branches):
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            normalized = device.normalize(tokens, positions[chunk], gamma, beta, head.eps, dtype)
            hidden = normalized.hidden.to(multiply)
            results = labels[chunk], out.losses[b, chunk], out.correct[b, chunk]
            if fused:
                device.loss(hidden, weight, bias, *results)
                continue
            logits = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])
            device.softmax_(logits, bias, *results, any(wanted), out.grad_bias[b] if out.grad_bias.numel() else None)
            if wanted.head:
                _add_product(out.grad_weight[b], logits.t(), hidden)
            if wanted.tokens or wanted.norm:
                device.normalize_backward(
                    torch.mm(logits, weight),
                    tokens,
                    positions[chunk],
                    normalized,
                    gamma,
                    out.grad_rows[b][chunk] if wanted.tokens else None,
                    out.grad_norm[b] if wanted.norm else None,
                )
    return out._replace(losses=out.losses.sum(1) / max(rows, 1), correct=out.correct.sum(1))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b: one product a chunk is rounded to a low dtype, its sum over chunks is not."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b))
