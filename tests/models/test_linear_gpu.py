"""The linear layer of the transformers on a GPU is PyTorch's: values, gradients, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beitv2_fast.models.vit import Linear, linear

from ..support.counting import kept
from ..support.gpu import HERE, autocast, distance, here, no_waiting
from .test_linear import problem, pytorch, results

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def results_here(function, tensors: list, gelu: bool) -> list:
    """As ``results``, with a gradient from above that lies on the device."""
    out = function(*tensors, gelu=gelu)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], upstream)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_those_of_the_cpu_in_fp64(dtype, bias, gelu):
    tensors = problem(bias=bias)
    exact = results(pytorch, [t if t is None else t.detach().double().requires_grad_() for t in tensors], gelu)
    with autocast(dtype):
        ours = results_here(linear, here(tensors), gelu)
    assert ours[0].dtype == dtype and all(g.dtype == torch.float32 for g in ours[1:])
    assert all(distance(a, b) < TOLERANCE[dtype] for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_under_autocast_it_loses_no_more_than_pytorch(gelu, dtype):
    x, *parameters = here(problem())
    tensors = [x.detach().to(dtype).requires_grad_(), *parameters]  # as the layer before it gives them
    exact = results_here(pytorch, [t.detach().double().requires_grad_() for t in tensors], gelu)
    with autocast(dtype):
        ours, theirs = (results_here(function, tensors, gelu) for function in (linear, pytorch))
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and distance(a, truth) <= 1.1 * distance(b, truth) + 1e-7


def test_after_a_gelu_only_its_input_is_kept():
    x = torch.randn(5, 32, device=HERE, requires_grad=True)
    assert kept(Linear(32, 8, gelu=True).to(HERE), x) == x.nbytes
    assert kept(nn.Sequential(nn.GELU(), nn.Linear(32, 8)).to(HERE), x) == 2 * x.nbytes


def test_the_host_waits_for_nothing():
    tensors = here(problem())
    expected = results_here(linear, tensors, True)
    upstream = torch.ones_like(expected[0])
    with no_waiting():
        gradients = torch.autograd.grad(linear(*tensors, gelu=True), tensors, upstream)
    assert all(g.isfinite().all() for g in gradients)
