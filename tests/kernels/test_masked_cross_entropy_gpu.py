"""masked_cross_entropy on a GPU: against fp64, in several chunks, for parts of the head, and without waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beitv2_fast.kernels import masked_cross_entropy

from ..support.gpu import DRY, HERE, autocast, cuda_only, distance, here, no_waiting, pick
from ..support.masked_problem import Problem, problem

pytestmark = pytest.mark.gpu

# Relative to the norm: the rounding of operands and of logits to the dtype; fp32 sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PARAMETERS = ("norm_weight", "norm_bias", "weight", "bias")


def on_gpu(**sizes) -> Problem:
    return replace(p := problem(**sizes), **here(vars(p)))


def middle_sized(**sizes) -> Problem:
    """Logits of about the size that trained heads have."""
    p = on_gpu(**{"images": 16, "patches": 49, "num_masked": 20, "dim": 96, "classes": 1000, **sizes})
    return replace(p, weight=(p.weight.detach() * 0.2).requires_grad_())


def assert_near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert (ours.double() - exact.double()).norm() <= tolerance * exact.double().norm() + 1e-6


def assert_near_fp64(p: Problem, dtype: torch.dtype = torch.float32, cast: bool = True) -> None:
    """Losses, with and without gradients, predictions, and the gradients of branches that count differently."""
    upstream = torch.tensor([1.0, 0.25], device=HERE)[: len(p.tokens)]
    with autocast(dtype if cast else torch.float32):
        losses, correct = p.ours()
        with torch.no_grad():
            alone, correct_alone = p.ours()
    exact = p.to(torch.float64)
    exact_losses, exact_correct = exact.reference()
    assert losses.dtype == torch.float32
    assert_near(losses, exact_losses, TOLERANCE[dtype])
    assert_near(alone, exact_losses, TOLERANCE[dtype])
    for found in (correct, correct_alone):
        assert (found - exact_correct).abs().max() <= TOLERANCE[dtype] * len(p.labels)
    leaves, exact_leaves = ([leaf for leaf in q.leaves if leaf.requires_grad] for q in (p, exact))
    ours = torch.autograd.grad(losses, leaves, upstream)
    theirs = torch.autograd.grad(exact_losses, exact_leaves, upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "cast model"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_losses_and_gradients_are_near_fp64(dtype, cast):
    p = middle_sized()
    assert_near_fp64(p if cast else p.to(dtype), dtype, cast)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [1, 7])
def test_one_image_and_one_masked_token_are_near_fp64(masked, dtype):
    assert_near_fp64(middle_sized(images=1, num_masked=masked, patches=49), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("branches", [1, 2])
def test_the_head_of_the_paper_is_near_fp64(branches, dtype):
    sizes = dict(images=pick(8, 1), patches=196, num_masked=75, dim=768, classes=pick(8192, 300), branches=branches)
    assert_near_fp64(replace(p := on_gpu(**sizes), weight=(p.weight.detach() * 0.02).requires_grad_()), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("dim", "classes"), [(1, 1), (3, 2), (33, 129), (1280, 64)])
def test_odd_widths_and_vocabularies_are_near_fp64(dim, classes, dtype):
    p = on_gpu(images=5, dim=dim, classes=classes)
    p = replace(p, weight=(p.weight.detach() * dim**-0.5).requires_grad_())
    if (dim, classes) in ((1, 1), (3, 2)) and dtype != torch.float32:
        dtype = torch.float32  # so few logits that rounding decides: nothing to average
    assert_near_fp64(p, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_mask_is_near_fp64(dtype):
    assert_near_fp64(middle_sized(num_masked=None), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_a_bias_it_is_near_fp64(dtype):
    assert_near_fp64(middle_sized(bias=False), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [("norm_weight", "norm_bias"), ("weight", "bias"), ("tokens",), PARAMETERS])
def test_with_a_frozen_part_the_others_get_their_gradients(frozen, dtype):
    p, upstream = middle_sized(), torch.tensor([1.0, 0.25], device=HERE)
    frozen_leaves = [leaf for name in frozen for leaf in (p.tokens if name == "tokens" else [getattr(p, name)])]
    kept = [leaf for leaf in p.leaves if all(leaf is not other for other in frozen_leaves)]
    with autocast(dtype):
        whole = torch.autograd.grad(p.ours()[0], kept, upstream)
        for leaf in frozen_leaves:
            leaf.requires_grad_(False)
        ours = torch.autograd.grad(p.ours()[0], kept, upstream)
    for a, b in zip(ours, whole, strict=True):
        assert_near(a, b, 1e-6 if dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_chunks_are_near_fp64(dtype, monkeypatch):
    if not DRY:
        from beitv2_fast.kernels.masked_cross_entropy import triton as host

        monkeypatch.setattr(host, "CHUNK_BYTES", 1)  # as few tokens as a chunk may have: 128
    assert_near_fp64(middle_sized(images=50, patches=16, num_masked=11), dtype)


def test_strided_branches_give_what_contiguous_ones_do():
    p = middle_sized()
    rest = {name: getattr(p, name) for name in PARAMETERS}
    for layout in (lambda t: t.mT.contiguous().mT, lambda t: torch.cat([t, t], -1)[..., ::2][..., : t.shape[-1]]):
        made = [layout(t.detach()) for t in p.branches]
        losses, correct = masked_cross_entropy(made, p.mask, p.labels, num_masked=p.num_masked, **rest)
        plain = [t.contiguous() for t in made]
        expected = masked_cross_entropy(plain, p.mask, p.labels, num_masked=p.num_masked, **rest)
        assert torch.equal(losses, expected[0]) and torch.equal(correct, expected[1])


@pytest.mark.parametrize("gradients", [True, False])
def test_huge_logits_and_a_class_that_a_bias_excludes(gradients):
    p = middle_sized()
    bias = p.bias.detach().clone()
    bias[5] = -torch.inf
    p = replace(p, weight=(p.weight.detach() * 1e4).requires_grad_(), bias=bias, labels=p.labels.clamp(min=6))
    with torch.set_grad_enabled(gradients):
        losses = p.ours()[0]
    assert distance(losses, p.to(torch.float64).reference()[0]) < 1e-5


@pytest.mark.parametrize("gradients", [True, False])
def test_a_nan_token_is_a_nan_loss_of_its_branch_only(gradients):
    p = middle_sized()
    tokens = [t.detach().clone() for t in p.tokens]
    tokens[0][0, 1:, 3] = torch.nan
    p = replace(p, tokens=[t.requires_grad_() for t in tokens])
    with torch.set_grad_enabled(gradients):
        losses, _ = p.ours()
    assert losses[0].isnan() and losses[1].isfinite()


def test_no_masked_token_is_loss_0_and_gradient_0():
    p = on_gpu(num_masked=0)
    losses, correct = p.ours()
    gradients = torch.autograd.grad(losses.sum(), p.leaves)
    assert (losses == 0).all() and (correct == 0).all() and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_waits_for_nothing(dtype):
    p = on_gpu(images=4, patches=49, num_masked=20, dim=96, classes=1000)

    def step() -> list[Tensor]:
        with autocast(dtype):
            losses = p.ours()[0]
            with torch.no_grad():
                alone = p.ours()[0]
        return [losses, alone, *torch.autograd.grad(losses.sum(), p.leaves)]

    expected = step()  # compiles
    with no_waiting():
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_the_same_bits_every_time(dtype):
    p = middle_sized()

    def gradients() -> tuple[Tensor, ...]:
        with autocast(dtype):
            return torch.autograd.grad(p.ours()[0].sum(), p.leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@cuda_only
def test_a_captured_graph_computes_the_loss_of_what_its_inputs_hold():
    p = middle_sized()
    with torch.no_grad(), autocast(torch.bfloat16):
        p.ours()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses, _ = p.ours()
        for _ in range(2):
            p.tokens[0].normal_()
            graph.replay()
            assert torch.equal(losses, p.ours()[0])


@cuda_only
def test_no_logits_in_memory_without_gradients():
    p = on_gpu(images=64, patches=100, num_masked=100, dim=32, classes=8192)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        p.ours()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        p.ours()
    assert torch.cuda.max_memory_allocated() - before < len(p.labels) * 8192 * 2 / 8


@pytest.mark.skipif(DRY, reason="on the CPU it is an error")
@pytest.mark.parametrize("label", [83, -1, 2**40])
def test_a_label_outside_the_vocabulary_is_a_nan_loss(label):
    p = on_gpu()
    labels = p.labels.clone()
    labels[0] = label
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert replace(p, labels=labels).ours()[0].isnan().all()


def test_compiles_without_a_graph_break(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    p = on_gpu()
    compiled = torch.compile(lambda: p.ours()[0].sum(), fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(), p.leaves), torch.autograd.grad(p.ours()[0].sum(), p.leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
