"""A quantizer's state: frozen and thawed, and loaded into a quantizer with other options."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast import FusedVectorQuantizer, GroupedResidualVectorQuantizer, ResidualVectorQuantizer

from ..support.quantizers import assert_same, noise, state

RULES = [
    {},
    {"learning": "sum_ema"},
    {"metric": "euclidean", "dead_below": 0.5},
    {"metric": "euclidean", "learning": "gradient"},
    {"learning": "gradient"},
    {"gradient": "rotation", "heads": 2},
    {"restart_below": 1.0, "restart_after": 2},
]


def train(quantizer: FusedVectorQuantizer, steps: range) -> None:
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1) if parameters else None
    for step in steps:
        loss = quantizer.train()(noise(60, 8, seed=step)).loss
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def trained(**options: object) -> FusedVectorQuantizer:
    """Started by k-means and moved by some steps."""
    quantizer = FusedVectorQuantizer(16, 8, **{"dead_after": 1.0, **options})
    train(quantizer, range(9))
    if options.get("learning") == "gradient":  # long trainings give the codes of a parameter any length
        quantizer.codebook.data *= 0.5 + noise(16, 1, seed=40).sigmoid()
    return quantizer


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_frozen_quantizer_keeps_its_state_and_learns_on_from_it_when_thawed(options):
    frozen = trained(**options)
    twin, before = copy.deepcopy(frozen), state(frozen)
    frozen.freeze()
    for step in range(9):
        z = noise(60, 8, seed=20 + step).requires_grad_()
        out = frozen(z)
        (out.loss + out.quantized.sum()).backward()
        assert z.grad.abs().sum() > 0 and frozen.codebook.grad is None
    assert_same(state(frozen), before)
    expected = copy.deepcopy(twin).eval()(z)
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.quantized, expected.quantized)
    assert frozen.usage()["used_codes"] > 0
    frozen.thaw()
    for quantizer in (frozen, twin):
        train(quantizer, range(9, 18))
    assert_same(state(frozen), state(twin))
    assert not torch.equal(frozen.codebook, before["codebook"])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_an_optimizer_does_not_move_a_frozen_codebook_by_old_gradients_or_decay(metric):
    quantizer = FusedVectorQuantizer(16, 8, metric=metric, learning="gradient").train()
    optimizer = torch.optim.AdamW(quantizer.parameters(), 0.1, weight_decay=0.1)
    quantizer(noise(60, 8)).loss.backward()
    optimizer.step()
    quantizer(noise(60, 8)).loss.backward()
    quantizer.freeze()
    before = quantizer.codebook.detach().clone()
    z = noise(60, 8).requires_grad_()
    out = quantizer(z)
    y = F.normalize(z, dim=-1) if metric == "cosine" else z
    torch.testing.assert_close(out.loss, F.mse_loss(y, out.quantized.detach()))  # without the codebook's term
    out.loss.backward()
    optimizer.step()
    assert torch.equal(quantizer.codebook, before)
    quantizer.thaw()
    quantizer(noise(60, 8)).loss.backward()
    optimizer.step()
    assert not torch.equal(quantizer.codebook, before)


def test_a_frozen_quantizer_that_was_not_started_starts_and_then_stays():
    quantizer, twin = (FusedVectorQuantizer(16, 8).train() for _ in range(2))
    quantizer.freeze()
    quantizer(noise(60, 8))
    twin.start(noise(60, 8))
    assert torch.equal(quantizer.codebook, twin.codebook) and bool(quantizer.initialized)


def test_copies_are_frozen_and_state_dicts_are_not():
    quantizer = trained()
    quantizer.freeze()
    assert copy.deepcopy(quantizer).frozen and "frozen" in repr(quantizer)
    loaded = FusedVectorQuantizer(16, 8, dead_after=1.0)
    loaded.load_state_dict(quantizer.state_dict())
    assert not loaded.frozen


@pytest.mark.parametrize("groups", [{}, {"groups": 2}])
def test_a_residual_quantizer_is_frozen_thawed_and_counted_with_all_its_stages(groups):
    kind = GroupedResidualVectorQuantizer if groups else ResidualVectorQuantizer
    quantizer = kind(16, 8, 3, **groups).train()
    quantizer(noise(60, 8))
    before = state(quantizer)
    quantizer.freeze()
    quantizer(noise(60, 8, seed=1))
    assert_same(state(quantizer), before)
    quantizer.thaw()
    quantizer.usage(reset=True)
    counts = quantizer(noise(60, 8, seed=1)).counts
    assert quantizer.usage()["used_codes"] == pytest.approx((counts > 0).float().mean().item())
    for name, value in quantizer.state_dict().items():
        assert not (name.endswith("codebook") and torch.equal(value, before[name]))


def test_a_compiled_quantizer_is_frozen_and_thawed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager = trained()
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for step, change in enumerate((None, "freeze", None, "thaw", None)):
        if change:
            for quantizer in (eager, model):
                getattr(quantizer, change)()
        before = state(model)
        for quantizer in (eager, compiled):
            quantizer(noise(60, 8, seed=step))
        assert torch.equal(model.codebook, before["codebook"]) == model.frozen
        assert_same(state(model), state(eager))


# Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({}, {"restart_below": 0.2}, "restart_below start at 0"),
        ({"restart_below": 0.2}, {}, "recent is left out"),
        ({}, {"learning": "sum_ema"}, "averages of learning='sum_ema' start"),
        ({"learning": "sum_ema"}, {}, "embed_avg is left out"),
        ({"learning": "sum_ema"}, {"learning": "gradient"}, "embed_avg is left out"),
        ({}, {"learning": "gradient"}, None),
        ({"learning": "gradient"}, {}, "normalized"),
        ({"learning": "gradient"}, {"learning": "sum_ema"}, "normalized.*sum_ema"),
        ({"learning": "gradient"}, {"learning": "frozen"}, "normalized"),
        ({"metric": "euclidean"}, {"metric": "euclidean", "learning": "gradient"}, "embed_avg is left out"),
        ({"metric": "euclidean", "learning": "gradient"}, {"metric": "euclidean"}, "sum_ema"),
        ({"heads": 2, "share_codebook": True}, {"heads": 2}, "each of the 2 heads"),
        (
            {"heads": 2, "share_codebook": True},
            {"heads": 2, "learning": "sum_ema", "restart_below": 0.2},
            "each of the 2 heads.*sum_ema.*restart_below",
        ),
    ],
    ids=str,
)
def test_a_state_of_other_options_is_loaded_with_a_word_and_started_right(old, new, said, strict):
    source, target = trained(**old), FusedVectorQuantizer(16, 8, seed=5, **{"dead_after": 1.0, **new})
    z = noise(60, 8, seed=30)
    expected = source.eval().encode(z)
    stored = {f"0.{name}": value for name, value in source.state_dict().items()}
    names = set(stored)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.nn.Sequential(target).load_state_dict(stored, strict=strict)
    assert set(stored) == names  # the caller's dict is left alone
    texts = [str(w.message) for w in caught]
    assert (len(texts) == 1 and re.search(f"^0.FusedVectorQuantizer: .*{said}", texts[0])) if said else not texts
    assert bool(target.initialized) and torch.equal(target.encode(z), expected)
    # One step moves the codes by no more than a step does; a code lost to its average would be at zero.
    before = target.codebook.detach().clone()
    train(target, range(30, 31))
    moved = (target.codebook - before).norm(dim=-1) / before.norm(dim=-1)
    assert moved.max() < 0.1
    again = FusedVectorQuantizer(16, 8, **{"dead_after": 1.0, **new})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(target.state_dict())  # its own state says nothing
    assert_same(state(again), state(target))


def test_a_codebook_by_itself_is_not_started_anew():
    codebook = F.normalize(noise(16, 8), dim=-1)
    quantizer = FusedVectorQuantizer(16, 8).train()
    quantizer.load_state_dict({"codebook": codebook}, strict=False)
    quantizer(noise(60, 8, seed=1))
    assert ((quantizer.codebook * codebook).sum(-1) > 0.99).all()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("new", [{"heads": 2}, {"heads": 2, "share_codebook": True}, {"num_codes": 32}])
def test_a_codebook_of_another_shape_is_refused_with_the_options_that_make_it(new, strict):
    options = {"num_codes": 16, "dim": 8, **new}
    said = rf"codebook is \[16, 8\] .*num_codes={options['num_codes']}, dim=8, heads={options.get('heads', 1)}"
    with pytest.raises(RuntimeError, match=said):
        FusedVectorQuantizer(**options).load_state_dict(trained().state_dict(), strict=strict)
