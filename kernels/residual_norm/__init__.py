"""residual_norm: what a transformer's block does between its branches, in one pass each way on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import residual_norm_op
from .reference import residual_norm_reference

__all__ = ["residual_norm"]


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    keep_rate: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """``s = x + gamma * branch * keep / keep_rate`` and ``LayerNorm(s) * weight + bias``.

    The sum is rounded once, to the widest of the dtypes of x, branch and gamma, which is that of the residual stream.
    On GPUs the norm comes in autocast's dtype, if it is on, and gradients of gamma, weight and bias are summed in one
    order: the same bits every time. Elsewhere, in fp64 and under ``torch.compile``, which fuses for itself, plain
    PyTorch runs. Differentiable once on GPUs.

    Args:
        x: [B, ..., C].
        branch: of x's shape, or None: s is x.
        gamma: layer scale [C], or None.
        keep: drop path, B values of 0 or 1, or None.
        keep_rate: their expectation.
        weight: [C] of the norm, or None, as bias: no norm.
        bias: [C] of the norm, or None.

    Returns:
        s, and the norm or None.

    Raises:
        ValueError: shapes that do not fit; half of a norm.
    """
    width = x.shape[-1:]
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"residual_norm: branch must have x's shape {list(x.shape)}; got {list(branch.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError("residual_norm: a norm needs both weight and bias; one of them is None")
    for name, tensor in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != width:
            raise ValueError(
                f"residual_norm: {name} must be {list(width)} like x's last axis; got {list(tensor.shape)}"
            )
    if keep is not None and keep.numel() != x.shape[0]:
        raise ValueError(f"residual_norm: keep must hold one value for each of {x.shape[0]} images; got {keep.numel()}")
    arguments = x, branch, gamma, keep, keep_rate, weight, bias, eps
    if not x.is_cuda or x.dtype == torch.float64 or x.numel() == 0 or torch.compiler.is_compiling():
        return residual_norm_reference(*arguments)
    return residual_norm_op(*arguments)
