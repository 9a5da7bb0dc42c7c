"""The definition of gelu_and_gradient in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_and_gradient_reference(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)
