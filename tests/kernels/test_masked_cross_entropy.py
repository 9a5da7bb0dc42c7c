"""masked_cross_entropy: losses, predictions and gradients against the definition, in every dtype and odd case."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from beitv2_fast.kernels import masked_cross_entropy
from beitv2_fast.kernels.masked_cross_entropy import ops
from beitv2_fast.kernels.masked_cross_entropy.chunked import Device, Head, Wanted, head_losses, softmax_
from beitv2_fast.kernels.masked_cross_entropy.ops import (
    masked_cross_entropy_op,
    masked_positions,
    softmax_native_,
    with_gradient_backward,
)
from beitv2_fast.kernels.native import native_ops

from ..support.counting import allocations, peak_of_backward
from ..support.dispatched import Dispatched
from ..support.masked_problem import Problem, problem

# Relative to the largest element. fp32: sums of up to a few hundred terms in another order.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, *parts: torch.Tensor) -> None:
    """``parts``: what ``theirs`` is a difference of, if they may be larger than it."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = max(1e-3, *(value.abs().max().item() for value in (theirs, *parts))) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def assert_same(p: Problem, upstream: torch.Tensor, tolerance: float) -> None:
    """Against the definition in fp64.

    A loss and its gradients are the logsumexp's less the label's. Where the softmax is sure of a token, the difference
    has few digits, in the definition no less than here: errors are measured by the label's part.
    """
    exact = p.to(torch.float64)
    (losses, correct), (same_losses, same_correct), (exact_losses, _) = p.ours(), p.reference(), exact.reference()
    with patch.object(F, "cross_entropy", F.nll_loss):
        label_losses, _ = exact.reference()
    assert losses.dtype == same_losses.dtype and torch.equal(correct, same_correct)
    assert_close(losses.double(), exact_losses, tolerance, label_losses)
    ours = torch.autograd.grad(losses, p.leaves, upstream)
    theirs, parts = (torch.autograd.grad(f, exact.leaves, upstream.double()) for f in (exact_losses, label_losses))
    for leaf, a, b, part in zip(p.leaves, ours, theirs, parts, strict=True):
        assert a.dtype == leaf.dtype
        assert_close(a.double(), b, tolerance, part)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_losses_predictions_and_gradients_are_the_references(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    patches, branches, seed = draw(1, 12), draw(1, 3), draw(0, 10**6)
    p = problem(
        draw(1, 4),
        patches,
        data.draw(st.sampled_from([None, draw(0, patches)])),
        dim=draw(4, 40),  # the LayerNorm of two numbers is +-1: its gradient is rounding noise
        classes=draw(1, 150),
        branches=branches,
        bias=data.draw(st.booleans()),
        seed=seed,
        dtype=data.draw(st.sampled_from(list(TOLERANCE))),
    )
    upstream = torch.randn(branches, generator=torch.Generator().manual_seed(seed))
    assert_same(p, upstream.to(p.weight.dtype), TOLERANCE[p.weight.dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_token_that_the_softmax_is_sure_of(dtype):
    p = problem(1, 2, 1, dim=20, classes=5, branches=1, bias=False, seed=400911)
    assert p.reference()[0] < 2e-4
    assert_same(p.to(dtype), torch.tensor([-2.0], dtype=dtype), TOLERANCE[dtype])


def test_many_chunks_give_the_same_as_one():
    p = problem(4, 100, 80, dim=16, classes=4000)  # 320 tokens, and 128 to a chunk of at least that many
    p = replace(p, weight=p.weight.detach().repeat(10, 1).requires_grad_(), bias=None)
    assert len(p.labels) > 2 * max((1 << 22) // len(p.weight), 128)
    assert_same(p, torch.tensor([0.3, 2.0]), 2e-5)


def test_gradcheck_in_fp64():
    p = problem(2, 5, 2, dim=4, classes=7, dtype=torch.float64)

    def losses(*leaves):
        changed = replace(p, **dict(zip(("norm_weight", "norm_bias", "weight", "bias"), leaves[2:], strict=True)))
        return replace(changed, tokens=list(leaves[:2])).ours()[0]

    assert torch.autograd.gradcheck(losses, p.leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "cast model"])
def test_low_precision_is_at_least_as_exact_as_eager(dtype, autocast):
    """Over several problems: of a few dozen numbers, as the norm's gradients are, the errors of one are a draw."""
    squares = [low_precision_errors(seed, dtype, autocast) for seed in range(1, 9)]
    for ours, eager, true in zip(*(map(sum, zip(*s, strict=True)) for s in zip(*squares, strict=True)), strict=True):
        assert ours**0.5 <= 1.05 * eager**0.5 + 1e-6 * true**0.5


def low_precision_errors(seed: int, dtype: torch.dtype, autocast: bool) -> tuple[list[float], ...]:
    """Squares of ours, of eager's and of the truth's norm, per gradient."""
    exact = problem(4, 30, 12, dim=64, classes=500, seed=seed)
    exact = replace(exact, weight=(exact.weight.detach() * 0.3).requires_grad_())
    low = exact if autocast else exact.to(dtype)
    exact = low.to(torch.float64)
    upstream = torch.tensor([1.0, 0.25])

    def run(function):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            losses = function()[0]
        assert losses.dtype == torch.float32
        return [losses, *torch.autograd.grad(losses, low.leaves, upstream)]

    losses = exact.reference()[0]
    truth = [losses, *torch.autograd.grad(losses, exact.leaves, upstream.double())]
    (losses, *gradients), (_, *eager_gradients) = run(low.ours), run(low.reference)
    torch.testing.assert_close(losses.double(), truth[0], rtol=torch.finfo(dtype).eps, atol=0)
    assert [g.dtype for g in gradients] == [g.dtype for g in eager_gradients]
    errors = [[a.double() - b for a, b in zip(g, truth[1:], strict=True)] for g in (gradients, eager_gradients)]
    return tuple([t.square().sum().item() for t in part] for part in (*errors, truth[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_a_low_dtype_sum_in_fp32(dtype):
    """As on devices with matrix units for the dtype: the same chunks, without widening the operands."""
    p = problem(2, 100, 80, dim=32, classes=100)  # 160 tokens: two chunks
    head = Head(p.norm_weight, p.norm_bias, 1e-6, p.weight, p.bias)
    with torch.no_grad():
        positions = masked_positions(p.mask, p.num_masked)
        run = lambda device: head_losses(  # noqa: E731
            p.branches, positions, p.labels, head, dtype, Wanted(True, True, True), device
        )
        narrow, wide = run(Device(500, softmax_native_)), run(Device(500, softmax_native_, widen=True))
    narrow, wide = ([*r.grad_rows, r.losses, r.grad_norm, r.grad_weight, r.grad_bias] for r in (narrow, wide))
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize(("dtype", "fast", "widened"), [(torch.bfloat16, True, False), (torch.bfloat16, False, True),
                                                        (torch.float16, True, True)])  # fmt: skip
def test_on_a_cpu_products_are_of_bf16_where_these_are_fast(dtype, fast, widened, monkeypatch):
    p = problem(2, 9, 4, dim=64, classes=50)
    monkeypatch.setattr(ops, "FAST_BF16", fast)
    with torch.autocast("cpu", dtype), torch.no_grad():
        losses = p.ours()[0]
    head = Head(p.norm_weight, p.norm_bias, 1e-6, p.weight, p.bias)
    given = p.branches, masked_positions(p.mask, p.num_masked), p.labels, head, dtype, Wanted(False, False, False)
    with torch.no_grad():
        both = [head_losses(*given, Device(1 << 22, softmax_native_, widen=widen)).losses for widen in (False, True)]
    assert torch.equal(losses, both[widened]) and not torch.equal(*both)


def test_all_tokens_with_a_padded_mask_have_the_gradient_of_a_slice_without_its_copy():
    p = problem(num_masked=4)
    expected = torch.autograd.grad(p.ours()[0].sum(), p.leaves)
    with Dispatched() as seen:
        head = {"norm_weight": p.norm_weight, "norm_bias": p.norm_bias, "weight": p.weight, "bias": p.bias}
        losses = masked_cross_entropy(p.tokens, F.pad(p.mask, (1, 0)), p.labels, **head, num_masked=4)[0]
        actual = torch.autograd.grad(losses.sum(), p.leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert seen.counts["beitv2_fast::with_gradient_backward"] == 3 and not seen.counts["aten::slice_backward"]


def test_upstream_gradients_of_stride_0_and_of_low_precision():
    gradient = torch.randn(2, 5, 3)
    for upstream in (torch.ones(1).expand(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(4)[::2]):
        result = with_gradient_backward(upstream, gradient, 2, torch.float32)
        torch.testing.assert_close(result, gradient.sum(0) / 2)
    p = problem()
    (half,) = torch.autograd.grad(p.ours()[0].bfloat16().sum(), [p.weight])
    (full,) = torch.autograd.grad(p.reference()[0].sum(), [p.weight])
    assert_close(half, full, 5e-6)


@pytest.mark.parametrize("frozen", ["tokens", "norm", "head", "all but bias", "first branch"])
def test_only_what_requires_a_gradient_gets_one(frozen):
    p = problem()
    groups = {
        "tokens": p.tokens,
        "norm": [p.norm_weight, p.norm_bias],
        "head": [p.weight, p.bias],
        "all but bias": [*p.tokens, p.norm_weight, p.norm_bias, p.weight],
        "first branch": p.tokens[:1],
    }
    for leaf in groups[frozen]:
        leaf.requires_grad_(False)
    trained = [leaf for leaf in p.leaves if leaf.requires_grad]
    ours, theirs = (torch.autograd.grad(f()[0].sum(), trained) for f in (p.ours, p.reference))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 5e-6)


def test_no_masked_token_is_loss_0_and_gradient_0():
    for num_masked in (0, None):
        p = replace(problem(num_masked=0), num_masked=num_masked)
        losses, correct = p.ours()
        assert losses.tolist() == [0, 0] and correct.tolist() == [0, 0]
        assert all(not gradient.any() for gradient in torch.autograd.grad(losses.sum(), p.leaves))


def test_huge_logits_do_not_overflow():
    p = problem()
    p = replace(p, weight=(p.weight.detach() * 1e30).requires_grad_(), bias=None)
    losses, _ = p.ours()
    assert losses.isfinite().all()
    torch.testing.assert_close(losses, p.reference()[0])


def test_nan_tokens_are_a_nan_loss_and_never_correct():
    p = replace(problem(), labels=torch.zeros(12, dtype=torch.int64))
    with torch.no_grad():
        p.tokens[0].fill_(torch.nan)
    losses, correct = p.ours()
    assert losses[0].isnan() and losses[1].isfinite() and correct[0] == 0
    losses.sum().backward()
    assert p.weight.grad.isnan().any()


@pytest.mark.parametrize("softmax_", [softmax_native_, softmax_])
def test_of_equal_logits_the_lowest_index_is_the_prediction(softmax_):
    logits = torch.zeros(4, 70)
    logits[2, 10], logits[3, 60] = 1.0, torch.nan
    losses, correct = torch.empty(4), torch.empty(4, dtype=torch.bool)
    softmax_(logits, None, torch.tensor([0, 69, 10, 60]), losses, correct, False, None)
    assert correct.tolist() == [True, False, True, False]


def test_without_grad_mode_no_gradient_is_computed():
    p = problem(4, 100, 80, dim=16, classes=2000)
    with torch.no_grad():
        losses, _ = p.ours()
        peak = allocations(p.ours)[0]
    assert not losses.requires_grad
    assert peak < allocations(p.ours)[0] - p.weight.numel() * 4
    assert torch.equal(losses, p.ours()[0])


def test_checkpointing_and_a_second_backward_through_a_kept_graph_give_the_same():
    p = problem()
    loss = p.ours()[0].sum()
    first = torch.autograd.grad(loss, p.leaves, retain_graph=True)
    checkpointed = torch.utils.checkpoint.checkpoint(lambda: p.ours()[0], use_reentrant=False).sum()
    for again in (loss, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(again, p.leaves), strict=True))


def test_losses_may_be_weighted_in_place():
    p = problem()
    losses = p.ours()[0]
    losses[1] *= 3.0
    weighted = p.reference()[0] @ torch.tensor([1.0, 3.0])
    for a, b in zip(*(torch.autograd.grad(loss, p.leaves) for loss in (losses.sum(), weighted)), strict=True):
        assert_close(a, b, 5e-6)


def test_differentiating_twice_is_an_error_not_a_wrong_number():
    p = problem()
    for weigh, of in ((torch.square, p.weight), (torch.clone, p.weight), (torch.clone, p.tokens[0])):
        losses = weigh(p.ours()[0])
        (gradient,) = torch.autograd.grad(losses.sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            (losses.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize(("autocast", "num_masked"), [(False, 4), (True, None)])
def test_compiles_without_a_graph_break(monkeypatch, tmp_path, autocast, num_masked):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = problem(num_masked=num_masked)

    def loss(mask, labels, *tokens):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            p = replace(first, mask=mask, labels=labels, tokens=[t * 1 for t in tokens])
            losses, correct = p.ours()
        return losses @ torch.tensor([1.0, 2.0]), correct

    compiled = torch.compile(loss, fullgraph=True)
    for p in (first, problem(num_masked=num_masked, seed=1)):  # ragged masks have another number of tokens
        (ours, correct), (theirs, their_correct) = (f(p.mask, p.labels, *p.tokens) for f in (compiled, loss))
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(correct, their_correct)
        leaves = [*p.tokens, *first.leaves[2:]]
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(p.mask, p.labels, *p.tokens)[0], theirs)


def test_ops_pass_opcheck():
    p = problem(bias=False)
    positions = masked_positions(p.mask, p.num_masked)
    leaves = [t.detach() for t in (p.norm_weight, p.norm_bias, p.weight)]
    for wanted in ((True, True, True), (False, False, False)):
        arguments = ([t.detach() for t in p.branches], positions, p.labels, *leaves, None, 1e-6, torch.float32, *wanted)
        torch.library.opcheck(masked_cross_entropy_op, arguments)
    torch.library.opcheck(with_gradient_backward, (torch.randn(2), torch.randn(2, 3, 4), 12, torch.bfloat16))
    scattered = (torch.randn(1), torch.randn(1, 12, 24), 12, torch.bfloat16, positions, *p.mask.shape)
    torch.library.opcheck(with_gradient_backward, scattered)


def test_memory_does_not_grow_with_tokens_times_classes():
    small, large = (problem(8, 50, n, dim=16, classes=20_000) for n in (32, 48))
    sizes = [peak_of_backward(lambda p=p: p.ours()[0].sum(), p.leaves) for p in (small, large)]
    rows = 2 * (len(large.labels) - len(small.labels))
    assert sizes[1] - sizes[0] < rows * 500  # all logits of a row are 80,000 bytes
    largest = allocations(lambda: torch.autograd.grad(large.ours()[0].sum(), large.leaves))[2]
    assert largest == max((1 << 22) // 20_000, 128) * 20_000 * 4  # the one chunk


class NoHostWait(TorchDispatchMode):
    """Fails at an operator whose result the host has to read, for its value or its shape."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags))
        if operator is torch.ops.aten.index.Tensor:  # only masks make a shape that nobody knows before
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not waits, operator
        return operator(*args, **(kwargs or {}))


def test_with_a_fixed_count_of_masked_tokens_the_host_waits_for_nothing():
    """The functions that GPUs run, here on the CPU; their Triton kernels cannot wait."""
    p = problem(3, 12, 4)
    head = Head(p.norm_weight, p.norm_bias, 1e-6, p.weight, p.bias)
    with torch.no_grad(), NoHostWait():
        positions = masked_positions._init_fn(p.mask, 4)
        head_losses(p.branches, positions, p.labels, head, torch.float32, Wanted(True, True, True), Device(500))
        with pytest.raises(AssertionError, match="nonzero"):
            masked_positions._init_fn(p.mask, None)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_memory_beyond_the_gradients_is_under_an_eighth_of_eagers(autocast):
    p = problem(16, 100, 100, dim=64, classes=8192)

    def loss(function):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return function()[0].sum()

    ours, eager = (peak_of_backward(lambda f=f: loss(f), p.leaves) for f in (p.ours, p.reference))
    assert ours < eager / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(11, dtype=torch.int64)}, "11 labels for 12 masked tokens"),
        ({"labels": torch.full((12,), 83)}, r"labels must lie in \[0, 83\)"),
        ({"labels": torch.full((12,), -1)}, r"they span \[-1, -1\]"),
        ({"labels": torch.zeros(12)}, "labels must be int64"),
        ({"num_masked": 5}, "num_masked = 5, but image 0"),
        ({"mask": torch.ones(3, 11)}, "mask must be bool"),
        ({"weight": torch.randn(83, 23)}, r"weight must be \[V, 24\]"),
        ({"bias": torch.randn(82)}, r"bias must be \[83\]"),
        ({"norm_weight": torch.randn(23)}, r"norm_weight must be \[24\]"),
        ({"tokens": []}, "no tokens were given"),
        ({"tokens": [torch.randn(3, 11, 24)]}, "Leave the CLS token out"),
        ({"tokens": [torch.zeros(3, 12, 24, dtype=torch.int64)]}, "tokens must be floating point"),
        ({"weight": torch.empty(83, 24, device="meta")}, "weight must be on cpu"),
    ],
)
def test_bad_input_says_what_was_given_and_expected(change, message):
    with pytest.raises(ValueError, match=message):
        replace(problem(), **change).ours()


def softmax_against_fp64() -> None:
    """The compiled softmax, with the instruction set of this process, against fp64."""
    for rows, classes, scale in ((1, 1, 1), (3, 7, 1), (17, 16, 10), (9, 100, 1), (21, 1531, 30), (5, 4099, 100)):
        torch.manual_seed(classes)
        logits, bias = torch.randn(rows, classes) * scale, torch.randn(classes)
        labels = torch.randint(classes, (rows,))
        losses, correct = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
        exact, exact_losses = (logits + bias).double(), torch.empty(rows, dtype=torch.float64)
        exact_correct, exact_sums, sums = torch.empty_like(correct), torch.ones(classes).double(), torch.ones(classes)
        softmax_(exact, None, labels, exact_losses, exact_correct, True, exact_sums)
        forward = logits.clone()
        softmax_native_(forward, bias, labels, losses, correct, False, None)
        forward_losses = losses.clone()
        softmax_native_(logits, bias, labels, losses, correct, True, sums)
        assert torch.equal(losses, forward_losses) and torch.equal(correct, exact_correct)
        torch.testing.assert_close(losses.double(), exact_losses, rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not native_ops(), reason="the C++ ops are not compiled")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_softmax_in_place_agrees_with_fp64(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        softmax_against_fp64()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not native_ops(), reason="the C++ ops are not compiled")
@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_softmax_agrees_with_fp64_on_lesser_instruction_sets(capability):
    if capability not in torch.ops.beitv2_fast_cpu.available_capabilities():
        pytest.skip(f"this CPU has no {capability}")
    code = "from tests.kernels.test_masked_cross_entropy import softmax_against_fp64 as run; run()"
    environment = {**os.environ, "BEITV2_FAST_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_compiled_ops_the_results_are_the_same(monkeypatch):
    monkeypatch.setattr(ops, "native_ops", lambda: False)
    assert_same(problem(), torch.ones(2), 5e-6)
