"""The steps of a chunk in plain PyTorch, for any device and dtype; CPU and GPU replace those that pay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather import rows_at


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
