"""The head's losses and gradients, chunk by chunk over the masked tokens: one chunk of logits exists at a time.

    hidden = LayerNorm(tokens[chunk]); logits = hidden W^T + c              2 C V FLOPs per token
    losses, logits <- softmax(logits) - one_hot(labels)                     in place, by the device's kernel
    dhidden = logits W; dW += logits^T hidden; dtokens = LayerNorm'(dhidden)    4 C V FLOPs per token

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


def rows_at(tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens [B, N, C] at positions [M] of the flattened [B, N]; by image and patch: flattening a slice copies it."""
    patches = tokens.shape[1]
    return tokens[positions // patches, positions % patches].contiguous()


class Normalized(NamedTuple):
    """hidden [R, C]: the operand of the products; mean and rstd (of any shape with R elements): for the backward."""

    hidden: Tensor
    mean: Tensor
    rstd: Tensor


def normalize(
    tokens: Tensor, positions: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Normalized:
    """LayerNorm of the tokens at the positions, in the dtype of weight (fp32 or fp64), then rounded to ``dtype``."""
    x = rows_at(tokens, positions).to(weight.dtype)
    hidden, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)
    return Normalized(hidden.to(dtype), mean, rstd)


def normalize_backward(
    grad_hidden: Tensor,
    tokens: Tensor,
    positions: Tensor,
    normalized: Normalized,
    weight: Tensor,
    grad_rows: Tensor | None,
    grad_norm: Tensor | None,
) -> None:
    """Writes the gradient by the rows into grad_rows [R, C] and adds those by weight and bias to grad_norm [2, C]."""
    x = rows_at(tokens, positions).to(weight.dtype)
    wanted = [grad_rows is not None, grad_norm is not None, grad_norm is not None]
    grad_x, *grad_parameters = torch.ops.aten.native_layer_norm_backward(
        grad_hidden.to(weight.dtype), x, x.shape[1:], normalized.mean, normalized.rstd, weight, weight, wanted
    )
    if grad_rows is not None:
        grad_rows.copy_(grad_x)
    if grad_norm is not None:
        grad_norm += torch.stack(grad_parameters)


def softmax_(
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
        wide.scatter_add_(1, target, -torch.ones_like(wide[:, :1]))
        if grad_bias is not None:
            grad_bias += wide.sum(0)
        if wide is not logits:
            logits.copy_(wide)


class Device(NamedTuple):
    """What differs between devices.

    chunk_logits: logits in a chunk. softmax_: see the function above. widen: compute low-precision products in fp32 (of
    rounded operands: each product is exact, and so are more of the sums' digits).
    """

    chunk_logits: int
    softmax_: Callable[..., None] = softmax_
    widen: bool = False


class Results(NamedTuple):
    """losses, correct [branches]; the gradients of M times each loss, [branches, ...], of size 0 if not wanted.

    The factor M keeps them in the range of fp16; the backward divides by it. Each branch's rows are a tensor of their
    own; those of all parameters lie side by side, so that one launch weighs them. The op returns the first four.
    """

    losses: Tensor
    correct: Tensor
    grad_rows: list[Tensor]  # branches x [M, C]
    grad_parameters: Tensor  # [branches, V C + V + 2 C], of which the others are views
    grad_weight: Tensor  # [branches, V, C]
    grad_bias: Tensor  # [branches, V]
    grad_norm: Tensor  # [branches, 2, C]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(
    branches: Sequence[Tensor],
    positions: Tensor,
    head: Head,
    dtype: torch.dtype,
    wanted: Wanted,
    *,
    zero: bool = True,
) -> Results:
    """Results that are zero, or hold nothing yet; losses and correct are of the rows: [branches, M]."""
    count, rows, (classes, dim) = len(branches), positions.shape[0], head.weight.shape
    wide = accumulation_dtype(dtype)
    new = branches[0].new_zeros if zero else branches[0].new_empty
    sizes = [classes * dim if wanted.head else 0, classes if wanted.head and head.bias is not None else 0]
    sizes.append(2 * dim if wanted.norm else 0)
    of_parameters = new((count, sum(sizes)), dtype=wide)
    weight, bias, norm = of_parameters.split(sizes, 1)
    return Results(
        new((count, rows), dtype=wide),
        new((count, rows), dtype=torch.bool),
        [new((rows, dim), dtype=wide) for _ in branches if wanted.tokens],
        of_parameters,
        weight.view(count, -1, dim),
        bias,
        norm.view(count, -1, dim),
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
    size = max(min(max(device.chunk_logits // classes, 128), rows), 1)
    buffer = weight.new_empty(size, classes)
    for b, tokens in enumerate(branches):
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            normalized = normalize(tokens, positions[chunk], gamma, beta, head.eps, dtype)
            hidden = normalized.hidden.to(multiply)
            results = labels[chunk], out.losses[b, chunk], out.correct[b, chunk]
            logits = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])
            device.softmax_(logits, bias, *results, any(wanted), out.grad_bias[b] if out.grad_bias.numel() else None)
            if wanted.head:
                _add_product(out.grad_weight[b], logits.t(), hidden)
            if wanted.tokens or wanted.norm:
                normalize_backward(
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
    """out += a b: each chunk's product is rounded to a low dtype, its sum over chunks is not."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b))
