"""gelu_and_gradient as an op, without the wrapper of ``torch.library.custom_op`` and its time on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import gelu_and_gradient_reference

NAME = "beitv2_fast::gelu_and_gradient"
torch.library.define(NAME, "(Tensor x, Tensor grad) -> (Tensor, Tensor)")


@torch.library.impl(NAME, "CPU")
def _cpu(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out, of_x = gelu_and_gradient_reference(x, grad)
    return out.contiguous(), of_x.contiguous()  # as the kernel's


@torch.library.impl(NAME, "CUDA")
def _cuda(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    from .triton import gelu_and_gradient_triton

    return gelu_and_gradient_triton(x, grad)


@torch.library.register_fake(NAME)
def _fake(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


gelu_and_gradient_op = torch.ops.beitv2_fast.gelu_and_gradient.default
