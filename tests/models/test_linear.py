"""The linear layer of the transformers is PyTorch's, keeps less, and under bf16 autocast loses no more than PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from beitv2_fast.models import vit as module
from beitv2_fast.models.vit import Linear, linear

from ..support.counting import kept
from ..support.pretend_gpu import OnGPU, pretend_gpu


def pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return F.linear(F.gelu(x) if gelu else x, weight, bias)


def problem(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((3, 7, 24), (40, 24), (40,)))
    return [t.requires_grad_() for t in (x, weight)] + [b.requires_grad_() if bias else None]


def results(function, tensors: list[Tensor | None], gelu: bool) -> list[Tensor]:
    """Output and gradients."""
    out = function(*tensors, gelu=gelu)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], upstream)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_values_and_gradients_are_pytorch_s(dtype, tolerance, bias, gelu):
    tensors = problem(dtype, bias)
    for ours, theirs in zip(results(linear, tensors, gelu), results(pytorch, tensors, gelu), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("fast", [False, True], ids=["widened", "bf16"])
def test_under_bf16_autocast_it_loses_no_more_than_pytorch(gelu, fast, monkeypatch):
    monkeypatch.setattr(module, "FAST_BF16", fast)
    x, *parameters = problem()
    tensors = [x.detach().bfloat16().requires_grad_(), *parameters]  # as the layer before it gives them
    exact = results(pytorch, [t.detach().double().requires_grad_() for t in tensors], gelu)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(function, tensors, gelu) for function in (linear, pytorch))
    assert ours[0].dtype == torch.bfloat16
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - truth).norm() <= 1.05 * (b - truth).norm()


def test_widened_products_round_neither_weights_nor_their_gradients(monkeypatch):
    monkeypatch.setattr(module, "FAST_BF16", False)
    x, weight, bias = problem()
    x = x.detach().bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, _, grad_weight, _ = results(linear, [x, weight, bias], False)
    assert torch.equal(out, F.linear(x, weight, bias).bfloat16())
    assert not torch.equal(grad_weight, grad_weight.bfloat16().float())


def test_after_a_gelu_only_its_input_is_kept():
    x = torch.randn(5, 32, requires_grad=True)
    assert kept(Linear(32, 8, gelu=True), x) == x.nbytes
    assert kept(nn.Sequential(nn.GELU(), nn.Linear(32, 8)), x) == 2 * x.nbytes


def test_under_autocast_the_input_is_kept_in_bf16_and_no_copy_of_the_weight():
    x = torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(Linear(32, 8), x) == x.nbytes // 2
        assert kept(nn.Linear(32, 8), x) > x.nbytes // 2


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, weight, bias = problem()
    linear(x.detach(), weight, bias).sum().backward()
    assert x.grad is None and weight.grad is not None
    weight.grad = None
    linear(x, weight.detach(), None).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_it_compiles_in_one_graph_to_the_same_values(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = Linear(24, 8, gelu=True)
    x = torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


def test_on_a_gpu_only_what_saves_memory_is_not_pytorch_s_own():
    with FakeTensorMode():  # what a GPU would be given, without one
        x, weight = (torch.empty(s, device="cuda", requires_grad=True) for s in ((3, 24), (8, 24)))
        names = [linear(x, weight, None, gelu=gelu).grad_fn.name() for gelu in (False, True)]
    assert names == ["MmBackward0", "_LinearBackward"]


def test_on_a_gpu_gelu_and_its_gradient_are_one_op_of_the_backward(monkeypatch):
    seen, op = [], module.gelu_and_gradient
    monkeypatch.setattr(module, "gelu_and_gradient", lambda x, grad: (seen.append(x.shape), op(x, grad))[1])
    tensors = problem()
    with pretend_gpu():
        there = [t.detach().as_subclass(OnGPU).requires_grad_() for t in tensors]
        found = results(linear, there, gelu=True)
    assert seen == [tensors[0].shape]
    for ours, theirs in zip(found, results(pytorch, tensors, gelu=True), strict=True):
        torch.testing.assert_close(ours.as_subclass(Tensor), theirs, rtol=1e-5, atol=1e-5)


def test_the_parameters_are_those_of_nn_linear():
    layer = Linear(24, 8, gelu=True)
    layer.load_state_dict(nn.Linear(24, 8).state_dict())
    assert "gelu=True" in repr(layer) and isinstance(layer, nn.Linear)
