"""residual_norm on NVIDIA and AMD GPUs: its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import cdiv, device_of, next_power_of_2
from .triton_rows import residual_norm_rows, residual_norm_rows_backward

PROGRAMS = 528  # of the backward: four per multiprocessor of an H100, each with its own sums for the parameters
TILE, TILE_ROWS = 1024, 8  # elements, and rows at most, that a program of the backward has in registers at a time


def forward_launch(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    return {"BLOCK_C": block, "num_warps": min(max(block // 256, 1), 16)}


def backward_launch(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    rows = min(max(TILE // block, 1), TILE_ROWS)
    return {"BLOCK_R": rows, "BLOCK_C": block, "num_warps": min(max(block // 256, 4), 16)}


def residual_norm_triton(
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
    """The sum (empty without a branch), the norm, mean and 1/std of its rows (empty without a norm)."""
    width = x.shape[-1]
    rows = x.numel() // width
    x = x.contiguous()
    total = torch.empty(x.shape if branch is not None else 0, dtype=sum_dtype, device=x.device)
    norm = torch.empty(x.shape if weight is not None else 0, dtype=norm_dtype, device=x.device)
    mean, rstd = torch.empty(2, rows if weight is not None else 0, dtype=torch.float32, device=x.device)
    with device_of(x):
        residual_norm_rows[(rows,)](
            x, _dense(branch), _dense(gamma), _dense(keep), _dense(weight), _dense(bias), total, norm, mean, rstd,
            width, rows // x.shape[0], 1 / keep_rate, eps,
            HAS_BRANCH=branch is not None, HAS_GAMMA=gamma is not None, HAS_KEEP=keep is not None,
            HAS_NORM=weight is not None, **forward_launch(width),
        )  # fmt: skip
    return total, norm, mean, rstd


def residual_norm_backward_triton(
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
    """As ``residual_norm_backward_reference``."""
    given = grad_sum if grad_norm is None else grad_norm
    assert given is not None
    shape, width, device = given.shape, given.shape[-1], given.device
    rows = given.numel() // width
    programs = min(PROGRAMS, rows)
    parameters = (gamma is not None) + 2 * (grad_norm is not None)
    grad_x = torch.empty(shape if grad_norm is not None else 0, dtype=x_dtype, device=device)
    grad_branch = torch.empty(shape if branch_dtype is not None else 0, dtype=branch_dtype, device=device)
    partial = torch.empty(programs, parameters, width, dtype=torch.float32, device=device)
    with device_of(given):
        residual_norm_rows_backward[(programs,)](
            _dense(grad_sum), _dense(grad_norm), _dense(total), mean, rstd, _dense(branch), _dense(gamma), _dense(keep),
            _dense(weight), grad_x, grad_branch, partial,
            rows, cdiv(rows, programs), width, rows // shape[0], 1 / keep_rate,
            HAS_SUM=grad_sum is not None, HAS_NORM=grad_norm is not None, HAS_BRANCH=branch_dtype is not None,
            HAS_GAMMA=gamma is not None, HAS_KEEP=keep is not None, **backward_launch(width),
        )  # fmt: skip
    return grad_x, grad_branch, partial.sum(0)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
