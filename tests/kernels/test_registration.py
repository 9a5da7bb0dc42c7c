"""Ops past the dispatcher: where they go there, that it changes nothing, and that who traces or watches sees the op."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.kernels.codebook_search.ops import codebook_search_op
from beitv2_fast.kernels.codebook_update.ops import codebook_statistics
from beitv2_fast.kernels.masked_cross_entropy.ops import gather_rows, masked_cross_entropy_op
from beitv2_fast.kernels.registration import Op
from beitv2_fast.kernels.vector_quantize.ops import quantize
from beitv2_fast.quantize.collapse import REPLACE_EVERY

from ..support.dispatched import Dispatched
from .test_strides import arguments, noise, tensors

OPS = {name.split("::")[1]: op for name, op in OPDEFS.items() if name.startswith("beitv2_fast::") and type(op) is Op}
CASES = [case for case in arguments() if case.split()[0] in OPS]


def asks_the_dispatcher(call: Callable[[], object]) -> bool:
    """Whether Python of torch's custom ops runs in it."""
    files: set[str] = set()
    sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(None)
    return any("/torch/_library/" in file for file in files)


@pytest.mark.parametrize("case", CASES)
def test_past_the_dispatcher_an_op_returns_and_writes_the_same_bits(case):
    op, found = OPS[case.split()[0]], []
    for call in (op, op._opoverload):
        given = tree_map_only(Tensor, torch.clone, arguments()[case])
        output: Any = []
        assert asks_the_dispatcher(lambda: output.append(call(*given))) == (call is not op)  # noqa: B023
        found.append((tensors(output, given), [t._version > 0 for t in tensors(given)]))
    (ours, we_counted), (theirs, they_counted) = found
    assert we_counted == they_counted
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


@pytest.mark.parametrize("case", [case for case in CASES if OPS[case.split()[0]]._backward_fn is not None])
def test_past_the_dispatcher_an_op_has_the_same_gradients(case):
    op, found = OPS[case.split()[0]], []
    for call in (op, op._opoverload):
        given = tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), arguments()[case])
        outputs = [t for t in tensors(call(*given)) if t.requires_grad]
        leaves = [t for t in tensors(given) if t.requires_grad]
        upstream = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
        found.append(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))
    assert found[0] and any(gradient is not None for gradient in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean", "heads": 2}, {"learning": "gradient"}], ids=str)
def test_an_ordinary_training_step_asks_the_dispatcher_for_none_of_its_ops(options):
    quantizer, x = FusedVectorQuantizer(8, 4, kmeans_init=False, **options), noise(3, 5, 4).requires_grad_()
    for _ in range(REPLACE_EVERY):  # in the last one dead codes restart
        assert not asks_the_dispatcher(lambda: quantizer(x).loss.backward())
    assert quantizer.steps == REPLACE_EVERY and x.grad.abs().sum() > 0


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "watcher",
    [FakeTensorMode, Dispatched, Functions, torch.inference_mode, torch.profiler.profile, forward_ad.dual_level],
    ids=lambda w: w.__name__,
)
def test_whoever_watches_sees_the_op(watcher: Callable[[], AbstractContextManager[object]]):
    with watcher():
        x, codebook = torch.ones(5, 4), torch.ones(3, 4)
        assert asks_the_dispatcher(lambda: codebook_search_op(x, codebook, "cosine", False, False, False))


def test_tensors_that_are_no_plain_memory_go_by_the_dispatcher():
    x, indices = noise(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    negated = torch.complex(noise(6, 4), -x).conj().imag
    assert negated.is_neg() and torch.equal(negated, x)
    expected = codebook_statistics(x, indices, 3, "euclidean")
    assert torch.equal(codebook_statistics(negated, indices, 3, "euclidean"), expected)
    with FakeTensorMode() as mode:
        fake = torch.ones(6, 4)
    assert codebook_statistics(fake, mode.from_tensor(indices), 3, "cosine").shape == (3, 5)  # outside of its mode
    assert codebook_statistics(x.to("meta"), indices.to("meta"), 3, "cosine").is_meta


class Named(Tensor):
    """A subclass that has functions of its own."""


def test_subclasses_go_by_the_dispatcher():
    x, codebook = noise(6, 4), noise(5, 4)
    outputs = quantize(x.as_subclass(Named), codebook, "euclidean", 1.0, 0.0, True)
    expected = quantize._opoverload(x.as_subclass(Named), codebook, "euclidean", 1.0, 0.0, True)
    assert [type(t) for t in outputs] == [type(t) for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("kind", [list, tuple])
def test_tensors_in_a_sequence_are_looked_at(kind):
    """Those that a dispatcher has to see are seen: here one that requires a gradient, which the op has no rule for."""
    tokens, *rest = arguments()["masked_cross_entropy"]
    assert not asks_the_dispatcher(lambda: masked_cross_entropy_op(kind(tokens), *rest))
    tokens = [tokens[0], tokens[1].clone().requires_grad_()]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        masked_cross_entropy_op(kind(tokens), *rest)[0].sum().backward()
    subclass = [tokens[0], tokens[1].detach().as_subclass(Named)]
    assert asks_the_dispatcher(lambda: masked_cross_entropy_op(kind(subclass), *rest))


@pytest.mark.parametrize("arguments", [([1.0], [0]), ()])
def test_without_a_tensor_the_dispatcher_says_what_is_wrong(arguments):
    with pytest.raises(RuntimeError, match="beitv2_fast::masked_gather"):
        gather_rows(*arguments)


def test_autocast_casts_what_has_a_rule_for_it():
    x, codebook = noise(6, 4).bfloat16().requires_grad_(), noise(5, 4)
    expected = quantize(x.float(), codebook, "cosine", 1.0, 0.0, True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = quantize(x, codebook, "cosine", 1.0, 0.0, True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def step(x: Tensor, codebook: Tensor) -> Tensor:
    quantized, indices, loss, _ = quantize(x, codebook, "cosine", 1.0, 0.0, False)
    return quantized.sum() + loss + codebook_statistics(x.detach(), indices, 5, "cosine").sum()


def test_traces_hold_the_ops():
    x, codebook = noise(6, 4), noise(5, 4)
    programs = [torch.export.export(Step(), (x, codebook), strict=strict) for strict in (False, True)]
    for graph in (make_fx(step)(x, codebook).graph, *[program.graph for program in programs]):
        names = {str(node.target) for node in graph.nodes}
        assert {"beitv2_fast.vector_quantize.default", "beitv2_fast.codebook_statistics.default"} <= names


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_by_the_dispatcher():
    batch, codebook = noise(3, 6, 4), noise(5, 4)

    def search(x: Tensor) -> Tensor:
        return codebook_search_op(x, codebook, "cosine", False, False, False)[0]

    expected, found = torch.stack([search(x) for x in batch]), []
    assert asks_the_dispatcher(lambda: found.append(torch.func.vmap(search)(batch)))
    assert torch.equal(found[0], expected)


class Step(torch.nn.Module):
    def forward(self, x: Tensor, codebook: Tensor) -> Tensor:
        return step(x, codebook)
