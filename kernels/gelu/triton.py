"""gelu_and_gradient on NVIDIA and AMD GPUs: its launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import cdiv, device_of
from .triton_elements import gelu_and_gradient_elements

BLOCK, NUM_WARPS = 1024, 4


def gelu_and_gradient_triton(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, of x's shape and dtype."""
    out, grad_x = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    with device_of(x):
        gelu_and_gradient_elements[(cdiv(x.numel(), BLOCK),)](
            x.contiguous(), grad.contiguous(), out, grad_x, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out, grad_x
