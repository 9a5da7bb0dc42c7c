"""The definition of residual_norm in plain PyTorch, and of its derivative, which the fast version computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    keep_rate: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Autograd differentiates it."""
    if branch is not None:
        scaled = branch if gamma is None else gamma * branch
        if keep is not None:
            scaled = scaled * keep.view(-1, *[1] * (x.dim() - 1)) / keep_rate
        x = x + scaled
    return x, None if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def residual_norm_backward_reference(
    grad_sum: Tensor | None,
    grad_norm: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    keep_rate: float,
    weight: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (empty without ``grad_norm``: then it is ``grad_sum``), of the branch (empty without a
    ``branch_dtype``), and [parameters, C] of those of gamma, weight and bias that there are.

    With y = (s - mean) rstd and g = dnorm weight: ``dx = dsum + rstd (g - mean(g) - y mean(g y))``. ``branch`` is
    needed for gamma only; total, mean and rstd with ``grad_norm`` only.
    """
    given = grad_sum if grad_norm is None else grad_norm
    assert given is not None
    dtype = torch.promote_types(given.dtype, torch.float32)
    dx = torch.zeros_like(given, dtype=dtype) if grad_sum is None else grad_sum.to(dtype)
    of_parameters, grad_x, rows = [], given.new_empty(0, dtype=x_dtype), tuple(range(given.dim() - 1))
    if grad_norm is not None:
        assert total is not None and mean is not None and rstd is not None and weight is not None
        grad, y = grad_norm.to(dtype), (total.to(dtype) - mean.view_as(total[..., :1])) * rstd.view_as(total[..., :1])
        g = grad * weight.to(dtype)
        dx = dx + rstd.view_as(total[..., :1]) * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
        of_parameters += [(grad * y).sum(rows), grad.sum(rows)]
        grad_x = dx.to(x_dtype)
    grad_branch = given.new_empty(0, dtype=branch_dtype)
    if branch_dtype is not None:
        if keep is not None:
            dx = dx * (keep.to(dtype) / keep_rate).view(-1, *[1] * (dx.dim() - 1))
        if gamma is not None:
            assert branch is not None
            of_parameters.insert(0, (dx * branch.to(dtype)).sum(rows))
            dx = dx * gamma.to(dtype)
        grad_branch = dx.to(branch_dtype, copy=True)
    none = given.new_empty(0, given.shape[-1], dtype=dtype)
    stacked = torch.stack(of_parameters) if of_parameters else none
    return grad_x.contiguous(), grad_branch.contiguous(), stacked
