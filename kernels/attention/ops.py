"""attention and its derivative as custom ops. Autocast leaves them alone: qkv has the dtype of the layer before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import native_ops
from ..registration import custom_op
from .reference import attention_backward_reference, attention_reference

WIDEST = 128  # heads on a GPU: a block of them has to fit into registers


def has_gpu_kernel(qkv: Tensor, scale: float = 1.0) -> bool:
    """Whether Triton kernels compute it: on a GPU, in bf16 or fp16. They count in units of 1 / scale."""
    low = qkv.dtype in (torch.bfloat16, torch.float16)
    return qkv.device.type == "cuda" and low and qkv.shape[-1] <= WIDEST and scale > 0


@custom_op("beitv2_fast::attention")
def attention_op(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out, and what the backward of the same version wants to know of the sum of each row."""
    if has_gpu_kernel(qkv, scale):
        from .triton import attention_triton  # here, so that the package imports without triton

        return attention_triton(qkv, bias, scale)
    if _native(qkv):
        out, sums = torch.ops.beitv2_fast_cpu.attention(_unit_stride(qkv), _for_kernel(bias), scale)
        return out, sums
    out, sums = attention_reference(qkv, bias, scale)
    return out.contiguous(), sums


@attention_op.register_fake
def _attention_fake(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    B, N, _, H, d = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    rows = (B, H, N) if has_gpu_kernel(qkv, scale) else (2, B, H, N)
    return qkv.new_empty(B, N, H, d), qkv.new_empty(rows, dtype=dtype)


@custom_op("beitv2_fast::attention_backward")
def attention_backward_op(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor | None, sums: Tensor, scale: float, of_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv, contiguous, and of the bias (empty without ``of_bias``). Only GPU kernels read ``out``."""
    if has_gpu_kernel(qkv, scale):
        from .triton import attention_backward_triton

        grad_qkv, grad_bias = attention_backward_triton(grad, qkv, bias, out, sums, scale, of_bias)
        return grad_qkv, grad_bias if bias is None or not of_bias else grad_bias.to(bias.dtype)
    if _native(qkv):
        tensors = (_unit_stride(grad), _unit_stride(qkv), _for_kernel(bias), sums.contiguous())
        grad_qkv, grad_bias = torch.ops.beitv2_fast_cpu.attention_backward(*tensors, scale, of_bias)
        return grad_qkv, grad_bias if bias is None else grad_bias.to(bias.dtype)
    grad_qkv, grad_bias = attention_backward_reference(grad, qkv, bias, scale)
    return grad_qkv.contiguous(), sums.new_empty(0) if bias is None or not of_bias else grad_bias.to(bias.dtype)


@attention_backward_op.register_fake
def _attention_backward_fake(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor | None, sums: Tensor, scale: float, of_bias: bool
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), sums.new_empty(0) if bias is None or not of_bias else bias.new_empty(bias.shape)


def _native(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu" and qkv.dtype != torch.float64 and qkv.numel() > 0 and native_ops()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _for_kernel(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, ctx.scale = inputs
    out, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(qkv, bias, out if has_gpu_kernel(qkv, ctx.scale) else None, sums)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    of_bias = ctx.needs_input_grad[1]
    grad_qkv, grad_bias = attention_backward_op(grad, *ctx.saved_tensors, ctx.scale, of_bias)
    return grad_qkv, grad_bias if of_bias else None, None


attention_op.register_autograd(_gradients, setup_context=_save_for_backward)
