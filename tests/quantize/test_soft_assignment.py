"""Soft assignment in chunks: the values and gradients of the whole matrix, without it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast import replace_quantizers
from beitv2_fast.quantize import soft
from beitv2_fast.quantize.soft import (
    code_cross_entropy,
    diversity_loss,
    entropies,
    index_backpropagation,
    soft_assignment,
)

from ..support.codebook_states import METRICS
from ..support.quantizers import noise
from .test_vq_pytorch import LEARNABLE, assert_same_training, swapped, vector_quantize


def logits(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    if metric == "euclidean":
        return -torch.cdist(x, codebook)
    return (F.normalize(x, dim=-1) if metric == "cosine" else x) @ codebook.T


@pytest.mark.parametrize("metric", [*METRICS, "dot"])
def test_values_and_gradients_are_those_of_the_whole_matrix(metric, monkeypatch):
    monkeypatch.setattr(soft, "CHUNK_SCORES", 20 * 7)
    codes = torch.randint(-1, 20, (50,), generator=torch.Generator().manual_seed(0))
    results = []
    for chunked in (False, True):
        x, codebook = noise(50, 8).requires_grad_(), noise(20, 8, seed=1).requires_grad_()
        if chunked:
            log_sum_exp, p = soft_assignment(x, codebook, metric=metric, temperature=0.5)
            loss = code_cross_entropy(x, codebook, codes, metric=metric, temperature=0.5)
            of_each, of_mean = entropies(x, codebook, metric=metric, temperature=0.5)
        else:
            scores = logits(x, codebook, metric) / 0.5
            log_sum_exp, p = scores.logsumexp(-1), scores.softmax(-1).mean(0)
            loss = F.cross_entropy(scores, codes, ignore_index=-1)
            of_each = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()
            of_mean = -(p * p.log()).sum()
        (loss + of_each - 0.3 * of_mean + log_sum_exp.square().mean() + (p * p.log()).sum()).backward()
        results.append((log_sum_exp, p, loss, of_each, of_mean, x.grad, codebook.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", [*METRICS, "dot"])
@pytest.mark.parametrize("shape", [(1, 1, 50), (5, 2, 7), (50, 1, 1)], ids=str)
@pytest.mark.parametrize("rows", [4, 15, 1000])
def test_the_diversity_is_that_of_the_whole_matrix_wherever_chunks_end(shape, rows, metric, monkeypatch):
    groups = shape[1]
    monkeypatch.setattr(soft, "CHUNK_SCORES", rows * groups * 20)
    results = []
    for chunked in (False, True):
        x, codes = noise(*shape, 3).requires_grad_(), noise(groups, 20, 3, seed=1).requires_grad_()
        if chunked:
            loss = diversity_loss(x, codes, metric=metric, temperature=0.1)
        else:
            p = torch.stack([(logits(x[:, g], codes[g], metric) / 0.1).softmax(-1) for g in range(groups)]).mean((0, 2))
            loss = (p * p.clamp(min=1e-5).log()).sum(-1).mean()
        loss.backward()
        results.append((loss, x.grad, codes.grad))
    assert results[0][1].abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_index_backpropagation_has_the_value_and_gradients_of_the_one_hot_matrix(temperature, monkeypatch):
    monkeypatch.setattr(soft, "CHUNK_SCORES", 20 * 7)
    results = []
    for chunked in (False, True):
        x, codebook = (noise(n, 8).double().requires_grad_() for n in (50, 20))
        if chunked:
            quantized, indices = index_backpropagation(x, codebook, temperature=temperature)
        else:
            p = (x @ codebook.T / temperature).softmax(-1)
            indices = p.argmax(-1)
            quantized = (F.one_hot(indices, 20) + p - p.detach()) @ codebook
        # The losses of the paper: both directions of the code, and the soft one.
        code = codebook[indices]
        loss = F.mse_loss(quantized, x) + F.mse_loss(code.detach(), x) + 0.25 * F.mse_loss(code, x.detach())
        (loss + quantized.sin().sum()).backward()
        results.append((quantized, indices, loss, x.grad, codebook.grad))
    torch.testing.assert_close(results[1], results[0])
    assert torch.equal(results[1][0], codebook[indices]) and (codebook.grad != 0).all()


def test_index_backpropagation_has_the_gradients_of_finite_differences_of_what_is_soft():
    x, codebook, upstream = noise(5, 3).double(), noise(4, 3, seed=1).double(), noise(5, 3, seed=2).double()
    fixed, step = codebook.clone(), 1e-6

    def soft_value(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return ((x @ codebook.T).softmax(-1) @ fixed * upstream).sum()

    x.requires_grad_()
    quantized, _ = index_backpropagation(x, codebook)
    (quantized * upstream).sum().backward()
    for i, d in ((0, 0), (4, 2)):
        moved = torch.zeros_like(x)
        moved[i, d] = step
        with torch.no_grad():
            slope = (soft_value(x + moved, codebook) - soft_value(x - moved, codebook)) / (2 * step)
        torch.testing.assert_close(x.grad[i, d], slope, rtol=1e-6, atol=1e-8)


def everything_soft(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    """One number of all that is soft, at a temperature of 0.5."""
    options = {"metric": metric, "temperature": 0.5}
    log_sum_exp, p = soft_assignment(x, codebook, **options)
    of_each, of_mean = entropies(x, codebook, **options)
    loss = code_cross_entropy(x, codebook, torch.arange(len(x)) % len(codebook) - 1, **options)
    loss = loss + diversity_loss(x.view(2, 2, -1, x.shape[1]), torch.stack([codebook, codebook.sin()]), **options)
    return loss + log_sum_exp.sin().sum() + p.square().sum() + of_each - 0.3 * of_mean


@pytest.mark.parametrize("metric", [*METRICS, "dot"])
@pytest.mark.parametrize("of", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_are_those_of_finite_differences(metric, of, monkeypatch):
    monkeypatch.setattr(soft, "CHUNK_SCORES", 1)
    x, codebook = (noise(n, 2, seed=n).double().requires_grad_(wanted) for n, wanted in zip((12, 5), of, strict=True))
    assert torch.autograd.gradcheck(lambda x, codebook: everything_soft(x, codebook, metric), (x, codebook))


def test_a_vector_that_is_a_code_has_the_gradient_of_the_clamped_distance():
    codebook, results = noise(5, 3, seed=1).double(), []
    for scores in (lambda x: (-(x - codebook).square().sum(-1).clamp(min=1e-8).sqrt()).logsumexp(-1),
                   lambda x: soft_assignment(x, codebook, metric="euclidean")[0]):  # fmt: skip
        x = codebook[2:3].clone().requires_grad_()
        scores(x).sum().backward()
        results.append(x.grad)
    assert results[0].abs().max() > 0.01
    torch.testing.assert_close(results[1], results[0])


def test_differentiating_twice_is_refused():
    x, codebook = noise(6, 3).requires_grad_(), noise(5, 3, seed=1)
    codes = torch.arange(6) % 5
    for value in (
        soft_assignment(x, codebook)[0].sum(),
        entropies(x, codebook)[0],
        code_cross_entropy(x, codebook, codes),
        index_backpropagation(x, codebook)[0].sum(),
        diversity_loss(x[None, None], codebook[None], metric="cosine", temperature=1.0),
    ):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.square().sum().backward()


def test_autocast_changes_no_bit():
    results = []
    for on in (False, True):
        x, codebook = noise(8, 4).requires_grad_(), noise(5, 4, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            value = everything_soft(x, codebook, "cosine") + index_backpropagation(x, codebook)[0].sin().sum()
        value.backward()
        results.append((value, x.grad, codebook.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_is_registered_keeps_torchs_rules():
    x, codebook = noise(6, 3).requires_grad_(), noise(5, 3, seed=1).requires_grad_()
    torch.library.opcheck(soft._assign, (x, codebook, 0.0))
    torch.library.opcheck(soft._assign, (x, codebook, 1e-8))
    x, codebook, ones = x.detach(), codebook.detach(), torch.ones(6)
    torch.library.opcheck(soft._assign_backward, (x, codebook, 0.0, ones, ones, torch.ones(5), None, True))
    torch.library.opcheck(soft._assign_backward, (x, codebook, 0.0, None, None, None, x, False))
    x, codebook, codes = x.requires_grad_(), codebook.requires_grad_(), torch.arange(6) % 5
    torch.library.opcheck(soft._cross_entropy, (x, codebook, codes, 0.0, True, True))
    torch.library.opcheck(soft._cross_entropy, (x.detach(), codebook.detach(), codes, 0.0, False, False))
    torch.library.opcheck(soft._diversity, (x.view(2, 3, 3), codebook.expand(2, 5, 3), 3, 1e-8, True, True))
    torch.library.opcheck(soft._diversity, (x.view(2, 3, 3), codebook.detach().expand(2, 5, 3), 3, 0.0, True, False))
    x = x.detach()
    torch.library.opcheck(soft._losses_backward, (torch.ones(1), x, x))


def test_entropies_of_codes_that_no_vector_wants_have_finite_gradients():
    x, codebook = noise(3, 8).requires_grad_(), noise(500, 8, seed=1).requires_grad_()
    of_each, of_mean = entropies(x, codebook, metric="dot", temperature=1e-3)
    assert of_each < 1e-3 and abs(of_mean - math.log(3)) < 1e-3
    (of_each - of_mean).backward()
    assert x.grad.isfinite().all() and codebook.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 1, 0, 8), (0, 1, 3, 8)], ids=str)
def test_the_diversity_of_nothing_is_0(shape):
    x, codes = noise(*shape).requires_grad_(), noise(1, 5, 8).requires_grad_()
    loss = diversity_loss(x, codes, metric="euclidean", temperature=1.0)
    loss.backward()
    assert loss == 0 and not codes.grad.any() and x.grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (0, 16)], ids=str)
def test_an_empty_batch_has_losses_of_0(shape):
    _, ours = swapped(codebook_diversity_loss_weight=2.0, commitment_use_cross_entropy_loss=True, **LEARNABLE)
    _, indices, loss = ours(noise(*shape).requires_grad_())
    loss.sum().backward()
    assert indices.shape == shape[:-1] and loss == 0 and not any(p.grad.any() for p in ours.parameters())


def test_a_single_vector_has_the_losses_of_a_batch_of_one():
    _, ours = swapped(codebook_diversity_loss_weight=2.0, commitment_use_cross_entropy_loss=True, **LEARNABLE)
    torch.testing.assert_close(ours(noise(16)), tuple(t[0] if t.dim() else t for t in ours(noise(1, 16))))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    x, codebook, options = noise(6, 3), noise(5, 3), {"temperature": temperature}
    for name, run in {
        "soft_assignment": lambda: soft_assignment(x, codebook, **options),
        "entropies": lambda: entropies(x, codebook, metric="euclidean", **options),
        "index_backpropagation": lambda: index_backpropagation(x, codebook, **options),
        "code_cross_entropy": lambda: code_cross_entropy(x, codebook, torch.arange(6) % 5, **options),
        "diversity_loss": lambda: diversity_loss(x[None, None], codebook[None], metric="cosine", **options),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: temperature must be positive; got {temperature}"):
            run()


@pytest.mark.parametrize("wrong", [5, -2])
def test_a_code_outside_the_codebook_is_named(wrong):
    with pytest.raises(IndexError, match=rf"code_cross_entropy: indices must lie in 0\.\.4.*{wrong}"):
        code_cross_entropy(noise(3, 8), noise(5, 8), torch.tensor([1, wrong, 4]))


class Everything(torch.nn.Module):
    def forward(self, x: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            *soft_assignment(x, codebook),
            *entropies(x, codebook, metric="euclidean"),
            *index_backpropagation(x, codebook),
            code_cross_entropy(x, codebook, codes),
            diversity_loss(x[None, None], codebook[None], metric="dot", temperature=0.5),
            diversity_loss(x[:, None, None], codebook[None], metric="euclidean", temperature=0.5),
        )


def test_it_is_exported_for_any_number_of_vectors():
    codebook, n = noise(5, 4, seed=1), torch.export.Dim("n")
    shapes, example = {"x": {0: n}, "codebook": None, "codes": {0: n}}, (noise(6, 4), codebook, torch.arange(6) % 5)
    program = torch.export.export(Everything(), example, dynamic_shapes=shapes, strict=False).module()
    for count in (0, 1, 2, 6, 50):
        inputs = noise(count, 4, seed=count), codebook, torch.arange(count) % 5
        torch.testing.assert_close(program(*inputs), Everything()(*inputs), rtol=0, atol=0)


def test_without_vectors_or_codes_to_find_the_loss_is_0():
    x = noise(3, 8)
    assert code_cross_entropy(x, noise(5, 8), torch.full((3,), -1)) == 0
    assert code_cross_entropy(x[:0], noise(5, 8), torch.zeros(0, dtype=torch.int64)) == 0
    assert entropies(x[:0], noise(5, 8)) == (0, 0)
    with pytest.raises(ValueError, match=r"int64 of shape \[3\]"):
        code_cross_entropy(x, noise(5, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="cosine, euclidean, dot; got 'l1'"):
        entropies(x, noise(5, 8), metric="l1")
    with pytest.raises(ValueError, match=r"diversity_loss: metric must be one of .* got 'l1'"):
        diversity_loss(x[None, None], noise(1, 5, 8), metric="l1", temperature=1.0)


LOSSES = [
    {"codebook_diversity_loss_weight": 2.0},
    {"commitment_use_cross_entropy_loss": True, "commitment_weight": 0.5},
    {"codebook_diversity_loss_weight": 2.0, "codebook_diversity_temperature": 3.0, **LEARNABLE},
    {"commitment_use_cross_entropy_loss": True, **LEARNABLE},
    {
        "commitment_use_cross_entropy_loss": True,
        "codebook_diversity_loss_weight": 2.0,
        "codebook_diversity_temperature": 5.0,
        "heads": 2,
        "codebook_dim": 8,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
    },
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_losses_of_vector_quantize_pytorch_agree(options):
    # The EMA writes to the codes from which the original's backward computes: its gradient is of other codes.
    call = {} if "learnable_codebook" in options else {"freeze_codebook": True}
    assert_same_training(*swapped(**options), return_loss_breakdown=True, **call)


def test_with_an_ema_they_have_the_originals_values_and_the_gradient_of_the_codes_searched():
    theirs, ours = swapped(commitment_use_cross_entropy_loss=True, decay=0.5)
    searched = ours.codebook.clone()
    x, y = noise(3, 20, 16).requires_grad_(), noise(3, 20, 16).requires_grad_()
    _, indices, loss = ours(x)
    torch.testing.assert_close(loss, theirs(x)[2], rtol=1e-5, atol=1e-5)
    loss.backward()
    F.cross_entropy(-torch.cdist(y.view(-1, 16), searched), indices.flatten()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)
    assert not torch.equal(ours.codebook, searched)


@pytest.mark.parametrize("options", [{"heads": 2, "codebook_dim": 8}, {"accept_image_fmap": True}], ids=str)
def test_they_agree_with_shared_heads_and_on_maps(options):
    losses = {"codebook_diversity_loss_weight": 2.0, "commitment_use_cross_entropy_loss": True}
    if options.get("accept_image_fmap"):
        losses.pop("commitment_use_cross_entropy_loss")  # the original takes indices of another shape than its own
    shape = (2, 16, 4, 5) if "accept_image_fmap" in options else (3, 20, 16)
    assert_same_training(*swapped(**losses, **options), shape, freeze_codebook=True)


def test_vectors_without_a_code_leave_no_trace_even_of_nan():
    codebook, codes = noise(5, 4, seed=1).requires_grad_(), torch.tensor([3, -1, 0])
    for metric in (*METRICS, "dot"):
        results = []
        for rows in ([0, 2], [0, 1, 2]):
            x = noise(3, 4).index_fill_(0, torch.tensor(1), torch.nan).requires_grad_()
            loss = code_cross_entropy(x[rows], codebook, codes[rows], metric=metric)
            results.append((loss, *torch.autograd.grad(loss, (x, codebook))))
        torch.testing.assert_close(*results)


def test_padding_takes_no_part_in_the_cross_entropy():
    theirs, ours = swapped(commitment_use_cross_entropy_loss=True)
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    assert_same_training(theirs, ours, steps=3, mask=mask, freeze_codebook=True)


def test_padding_takes_no_part_in_the_start_before_it():
    codebooks, mask = [], torch.arange(20) < torch.tensor([[20], [7], [1]])
    for padding in (0.0, 9.0):
        _, ours = swapped(commitment_use_cross_entropy_loss=True, kmeans_init=True)
        ours(torch.where(mask[..., None], noise(3, 20, 16), padding), mask=mask)
        codebooks.append(ours.codebook)
    assert torch.equal(*codebooks)


@pytest.mark.parametrize("training", [True, False])
def test_a_call_with_indices_returns_the_cross_entropy_to_them(training):
    theirs = vector_quantize().train(training)
    ours = replace_quantizers(copy.deepcopy(theirs))
    indices = torch.randint(0, 32, (3, 20), generator=torch.Generator().manual_seed(0))
    for a, b in zip(theirs(noise(3, 20, 16), indices=indices), ours(noise(3, 20, 16), indices=indices), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
