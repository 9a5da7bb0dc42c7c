"""Quantizers that draw their codes in training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from beitv2_fast import FusedVectorQuantizer, replace_quantizers

from ..support.quantizers import noise, quantizer
from ..support.replaced import vector_quantize

OPTIONS = [
    {},
    {"metric": "euclidean", "gradient": "rotation"},
    {"learning": "gradient", "heads": 2},
    {"learning": "frozen", "heads": 2, "share_codebook": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_draws_the_same_codes_again_and_every_step_others(options):
    first, second = (
        quantizer(temperature=1.0, kmeans_init=False, dead_after=0, decay=1.0, **options) for _ in range(2)
    )
    steps = [first(noise(40, 8)).indices for _ in range(3)]
    for indices in steps:
        torch.manual_seed(0)
        assert torch.equal(second(noise(40, 8)).indices, indices)
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[1], steps[2])
    assert not torch.equal(quantizer(temperature=1.0, seed=1, **options)(noise(40, 8)).indices, steps[0])


def test_values_and_gradient_are_those_of_the_codes_drawn_and_eval_takes_the_nearest():
    drawing = quantizer(temperature=1.0, kmeans_init=False, metric="euclidean", learning="gradient", dead_after=0)
    x = noise(40, 8).requires_grad_()
    codes = drawing.codebook.detach().clone().requires_grad_()
    out = drawing(x)
    chosen = codes[out.indices]
    torch.testing.assert_close(out.quantized, chosen)
    loss = F.mse_loss(noise(40, 8), chosen) * 2
    torch.testing.assert_close(out.loss, loss)
    (out.loss + out.quantized.sum()).backward()
    (loss / 2).backward()
    torch.testing.assert_close(drawing.codebook.grad, codes.grad)
    torch.testing.assert_close(x.grad, 1 + 2 * (x - chosen).detach() / x.numel())
    nearest = torch.cdist(x, codes).argmin(1)
    assert (out.indices != nearest).any() and torch.equal(drawing.encode(x), nearest)
    assert torch.equal(drawing.eval()(x).indices, nearest)


@pytest.mark.parametrize("learning", ["code_ema", "frozen"])
def test_a_recomputed_forward_draws_what_its_first_one_drew(learning):
    options = {"temperature": 1.0, "learning": learning, "kmeans_init": False}
    plain, checkpointed = quantizer(**options), quantizer(**options)
    gradients = []
    for module, run in ((plain, lambda f, x: f(x)), (checkpointed, lambda f, x: checkpoint(f, x, use_reentrant=False))):
        x, y = noise(40, 8).requires_grad_(), noise(40, 8, seed=1).requires_grad_()
        # The square keeps what a recomputation has to find again.
        total = sum(run(lambda z, m=module: m(z).quantized.square().sum(), z) for z in (x, y))
        total.backward()
        gradients.append((x.grad, y.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])
    assert torch.equal(plain.steps, checkpointed.steps)


def test_forwards_of_one_step_draw_differently():
    drawing = quantizer(temperature=1.0, kmeans_init=False)
    drawing.forwards_per_step = 2
    assert not torch.equal(drawing(noise(40, 8)).indices, drawing(noise(40, 8)).indices)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=str)
def test_swapped_quantizers_draw_with_the_originals_frequencies(options):
    options = {"codebook_size": 8, "stochastic_sample_codes": True, "sample_codebook_temp": 0.5, **options}
    theirs = vector_quantize(freeze_codebook=True, **options)
    theirs._codebook.embed.copy_(noise(1, 8, 16, seed=4) / 4)
    ours = replace_quantizers(copy.deepcopy(theirs))
    x, frequencies = noise(1, 16).expand(1, 20_000, 16), []
    torch.manual_seed(0)
    for module in (theirs, ours):
        for temperature in (None, 0.1):
            indices = module(x, sample_codebook_temp=temperature)[1]
            frequencies.append(torch.bincount(indices.flatten(), minlength=8) / 20_000)
    for a, b in zip(frequencies[:2], frequencies[2:], strict=True):
        assert (a - b).abs().max() < 5 * (0.25 * 2 / 20_000) ** 0.5
    assert (frequencies[0] - frequencies[1]).abs().max() > 0.1
    assert torch.equal(ours.eval()(x)[1], theirs.eval()(x)[1])
    assert isinstance(ours, FusedVectorQuantizer) and ours.temperature == 0.5
