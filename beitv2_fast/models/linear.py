"""A linear layer for training: it keeps less for backward, and multiplies bf16 in fp32 where that is faster.

- With ``gelu=True`` it computes ``W gelu(x) + b`` and keeps x alone; gelu(x), as large, is computed again in backward.
  That is an elementwise pass beside three matrix products.
- Under bf16 autocast on a CPU without AMX the products' operands are widened to fp32: oneDNN's bf16 products take
  almost twice as long there. Activations stay bf16 in memory; weights and their gradients are not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAST_BF16_ON_CPU = torch.cpu._is_amx_tile_supported()


class Linear(nn.Linear):
    """``nn.Linear``, or with ``gelu`` the one after an exact GELU; same parameters, same values."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool = False):
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=self.gelu)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


class FullPrecisionLinear(nn.Linear):
    """``nn.Linear`` in fp32, or fp64 for fp64 inputs, whatever autocast and the dtype of its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """``x W^T + b``, or with ``gelu`` ``gelu(x) W^T + b``: [..., in] -> [..., out]; under autocast in its dtype.

    Differentiable once. Compiled or without gradients it is PyTorch's own, since compilers choose themselves what to
    keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(F.gelu(x) if gelu else x, weight, bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if x.dtype == torch.float64:
        dtype = x.dtype
    return _Linear.apply(x.to(dtype), weight, bias, gelu)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the operands of a product are widened to."""
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not FAST_BF16_ON_CPU
    return torch.float32 if slow else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        dtype = _product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            a = (F.gelu(x) if gelu else x).to(dtype)
            return F.linear(a, weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dtype = _product_dtype(x)
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [M, out]
            if ctx.needs_input_grad[1]:
                a = (F.gelu(x) if ctx.gelu else x).reshape(-1, x.shape[-1]).to(dtype)
                grad_weight = (g.t() @ a).to(weight.dtype)
                del a
            if ctx.needs_input_grad[2]:
                grad_bias = g.sum(0).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = (g @ weight.to(dtype)).to(x.dtype).view(x.shape)
                if ctx.gelu:
                    grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, grad_weight, grad_bias, None
