"""gelu_and_gradient as a custom op."""

from __future__ import annotations

from torch import Tensor

from ..registration import custom_op
from .reference import gelu_and_gradient_reference


@custom_op("beitv2_fast::gelu_and_gradient")
def gelu_and_gradient_op(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out, of_x = gelu_and_gradient_reference(x, grad)
    return out.contiguous(), of_x.contiguous()  # as the kernel's


@gelu_and_gradient_op.register_kernel("cuda")
def _gelu_and_gradient_cuda(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    from .triton import gelu_and_gradient_triton

    return gelu_and_gradient_triton(x, grad)


@gelu_and_gradient_op.register_fake
def _gelu_and_gradient_fake(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)
