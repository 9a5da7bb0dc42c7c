"""residual_norm and its derivative as custom ops, and the autograd function between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import custom_op
from .reference import residual_norm_backward_reference, residual_norm_reference


@custom_op("beitv2_fast::residual_norm")
def forward_op(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    keep_rate: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sum_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a GPU's kernel returns, in plain PyTorch: the sum (empty without a branch), the norm, and mean and 1/std of
    its rows (empty without a norm)."""
    total, _ = residual_norm_reference(x, branch, gamma, keep, keep_rate, None, None, eps)
    total, empty = total.to(sum_dtype).contiguous(), x.new_empty(0, dtype=torch.float32)
    out = total if branch is not None else x.new_empty(0, dtype=sum_dtype)
    if weight is None or bias is None:
        return out, x.new_empty(0, dtype=norm_dtype), empty, empty.clone()
    parameters = (weight.float(), bias.float())
    norm, mean, rstd = torch.native_layer_norm(total.float(), total.shape[-1:], *parameters, eps)
    return out, norm.to(norm_dtype).contiguous(), mean.flatten(), rstd.flatten()


@forward_op.register_kernel("cuda")
def _forward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton import residual_norm_triton

    return residual_norm_triton(*arguments)


@forward_op.register_fake
def _forward_fake(x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, weight, _, _, sum_dtype, norm_dtype = rest
    rows = 0 if weight is None else x.numel() // x.shape[-1]
    return (
        x.new_empty(0 if branch is None else x.shape, dtype=sum_dtype),
        x.new_empty(0 if weight is None else x.shape, dtype=norm_dtype),
        *(x.new_empty(rows, dtype=torch.float32) for _ in range(2)),
    )


backward_op = custom_op("beitv2_fast::residual_norm_backward")(residual_norm_backward_reference)


@backward_op.register_kernel("cuda")
def _backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import residual_norm_backward_triton

    return residual_norm_backward_triton(*arguments)


@backward_op.register_fake
def _backward_fake(grad_sum: Tensor | None, grad_norm: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, _, gamma, _, _, _, x_dtype, branch_dtype = rest
    given = grad_sum if grad_norm is None else grad_norm
    assert given is not None
    dtype = torch.promote_types(given.dtype, torch.float32)
    return (
        given.new_empty(0 if grad_norm is None else given.shape, dtype=x_dtype),
        given.new_empty(0 if branch_dtype is None else given.shape, dtype=branch_dtype),
        given.new_empty((gamma is not None) + 2 * (grad_norm is not None), given.shape[-1], dtype=dtype),
    )


def residual_norm_op(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    keep_rate: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    arguments = x, branch, gamma, keep, keep_rate, weight, bias, eps
    sum_dtype, device = x.dtype, x.device.type
    for tensor in (branch, gamma) if branch is not None else ():
        sum_dtype = sum_dtype if tensor is None else torch.promote_types(sum_dtype, tensor.dtype)
    norm_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sum_dtype
    if torch.is_grad_enabled():
        stream, normed = _ResidualNorm.apply(*arguments, sum_dtype, norm_dtype)
        return stream, normed
    total, norm, _, _ = forward_op(*arguments, sum_dtype, norm_dtype)
    return x if branch is None else total, None if weight is None else norm


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        x, branch, gamma, keep, ctx.keep_rate, weight, *_ = arguments
        total, norm, mean, rstd = forward_op(*arguments)
        total = x if branch is None else total
        ctx.x_dtype, ctx.branch_dtype = x.dtype, None if branch is None else branch.dtype
        normed = (None, None, None) if weight is None else (total, mean, rstd)
        ctx.save_for_backward(*normed, branch if gamma is not None else None, gamma, keep, weight)
        ctx.set_materialize_grads(False)
        return total, None if weight is None else norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sum: Tensor | None, grad_norm: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_sum is None and grad_norm is None:
            return (None,) * 10
        total, mean, rstd, branch, gamma, keep, weight = ctx.saved_tensors
        grad_x, grad_branch, of_parameters = backward_op(
            grad_sum, grad_norm, total, mean, rstd, branch, gamma, keep, ctx.keep_rate, weight,
            ctx.x_dtype, ctx.branch_dtype,
        )  # fmt: skip
        rows = list(of_parameters.unbind(0))
        of_gamma = rows.pop(0).to(gamma.dtype) if gamma is not None else None
        of_weight, of_bias = (row.to(weight.dtype) for row in rows) if rows else (None, None)
        if grad_norm is None and grad_sum is not None:
            grad_x = grad_sum.to(ctx.x_dtype)
        of_branch = None if ctx.branch_dtype is None else grad_branch
        return grad_x, of_branch, of_gamma, None, None, of_weight, of_bias, None, None, None
