"""gelu_and_gradient is the GELU and its derivative, and the op is what it is registered as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.kernels import gelu_and_gradient
from beitv2_fast.kernels.gelu.ops import gelu_and_gradient_op


@pytest.mark.parametrize("function", [gelu_and_gradient, gelu_and_gradient_op])
def test_they_are_autograd_s(function):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, dtype=torch.float64)
    expected = F.gelu(x)
    (gradient,) = torch.autograd.grad(expected, x, grad)
    out, grad_x = function(x.detach(), grad)
    assert torch.equal(out, expected) and torch.equal(grad_x, gradient)


def test_the_op_is_what_it_is_registered_as():
    x = torch.randn(4, 6)
    torch.library.opcheck(gelu_and_gradient_op, (x, x + 1), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"got torch.float32 \[2\] and torch.float32 \[3\]"):
        gelu_and_gradient(torch.zeros(2), torch.zeros(3))
