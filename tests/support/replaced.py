"""A module and its replacement, side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .quantizers import noise

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, sums in another order


def assert_same_step(theirs: nn.Module, ours: nn.Module, z: Tensor, *args: object, **kwargs: object) -> None:
    """Outputs of any structure, and the gradients of the input and of all parameters."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        x = z.clone().requires_grad_()
        out = module(x, *args, **kwargs)
        quantized, *rest = out
        loss = next(t for t in rest if t.dim() == 0)
        total = loss + (quantized * noise(*quantized.shape, seed=9)).sum()
        if total.requires_grad:
            total.backward()
        gradients = {name.rsplit(".", 1)[-1]: p.grad for name, p in module.named_parameters() if p.requires_grad}
        results.append((out, x.grad, gradients))
    (a, grad_a, params_a), (b, grad_b, params_b) = results
    torch.testing.assert_close(b, a, **TOLERANCE)
    torch.testing.assert_close(grad_b, grad_a, **TOLERANCE)
    assert params_a.keys() == params_b.keys()
    torch.testing.assert_close(params_b, params_a, **TOLERANCE)


def assert_same_steps(theirs: nn.Module, ours: nn.Module, shape: tuple[int, ...]) -> None:
    """20 of them, by gradient."""
    for step in range(20):
        assert_same_step(theirs, ours, noise(*shape, seed=step))
        for parameter in (*theirs.parameters(), *ours.parameters()):
            parameter.data.sub_(parameter.grad, alpha=0.1)


def vector_quantize(**options: object) -> nn.Module:
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    return package.VectorQuantize(**{"dim": 16, "codebook_size": 32, **options})
