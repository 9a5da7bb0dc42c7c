"""NormEMAAdapter against a class with the interface of BEiT v2's quantizer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beitv2_fast import FusedVectorQuantizer, NormEMAAdapter, Unsupported, replace_quantizers

from ..support.other_quantizers import NormEMAVectorQuantizer
from ..support.quantizers import noise
from ..support.replaced import TOLERANCE, assert_same_step


def test_the_references_quantizer_agrees_over_training_steps_and_its_checkpoints_load():
    theirs = NormEMAVectorQuantizer(32, 8, beta=0.5)
    model = replace_quantizers(nn.Sequential(copy.deepcopy(theirs)), {NormEMAVectorQuantizer: NormEMAAdapter})
    ours = model[0]
    assert isinstance(ours, FusedVectorQuantizer) and ours.dead_after == 0
    for step in range(20):
        z = noise(2, 8, 4, 5, seed=step)
        assert_same_step(theirs, ours, z)
        torch.testing.assert_close(ours.codebook, theirs.embedding.weight.data, **TOLERANCE)
        torch.testing.assert_close(ours.cluster_size, theirs.cluster_size, **TOLERANCE)
    assert_same_step(theirs.eval(), ours.eval(), noise(2, 8, 4, 5, seed=26))
    assert ours.cluster_size.sum() > 0
    ours.reset_cluster_size(ours.cluster_size.device)
    assert (ours.cluster_size == 0).all()
    ours.codebook.zero_()
    model.load_state_dict({f"0.{name}": value for name, value in theirs.state_dict().items()})
    assert torch.equal(ours.codebook, theirs.embedding.weight)


def test_a_frozen_codebook_of_the_references_quantizer_stays_and_can_be_thawed():
    theirs = NormEMAVectorQuantizer(32, 8)
    theirs.embedding.update = False
    ours = replace_quantizers(copy.deepcopy(theirs), {NormEMAVectorQuantizer: NormEMAAdapter})
    before = ours.codebook.clone()
    for step in range(3):
        assert_same_step(theirs, ours, noise(2, 8, 4, 5, seed=step))
    assert torch.equal(ours.codebook, before) and torch.equal(theirs.embedding.weight, before)
    torch.testing.assert_close(ours.cluster_size, theirs.cluster_size)
    theirs.embedding.update = True
    ours.thaw()
    assert_same_step(theirs, ours, noise(2, 8, 4, 5, seed=3))
    torch.testing.assert_close(ours.codebook, theirs.embedding.weight.data, **TOLERANCE)
    assert not torch.equal(ours.codebook, before)


def test_the_references_codebook_is_found_under_its_old_names():
    theirs = NormEMAVectorQuantizer(32, 8)
    ours = replace_quantizers(copy.deepcopy(theirs), {NormEMAVectorQuantizer: NormEMAAdapter})
    indices = torch.tensor([[3, 1], [0, 31]])
    assert torch.equal(ours.embedding(indices), theirs.embedding.weight[indices])
    for update in (False, True):
        ours.embedding.update = update
        assert ours.embedding.update is update
        before = ours.embedding.weight.clone()
        ours(noise(2, 8, 4, 5))
        assert torch.equal(ours.embedding.weight, before) is not update


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_codes_of_other_lengths_are_found_by_distance_as_the_references_quantizer_does(update, loaded):
    theirs = NormEMAVectorQuantizer(32, 8, beta=0.5)
    swap = {NormEMAVectorQuantizer: NormEMAAdapter}
    ours = replace_quantizers(copy.deepcopy(theirs), swap) if loaded else None
    theirs.embedding.weight.mul_(0.5 + noise(32, 1, seed=3).sigmoid())
    theirs.embedding.update = update
    if loaded:
        ours.load_state_dict(theirs.state_dict())
        ours.freeze(not update)
    else:
        ours = replace_quantizers(copy.deepcopy(theirs), swap)
    z = noise(2, 8, 4, 5)
    by_product = (F.normalize(z.movedim(1, -1), dim=-1).flatten(0, -2) @ theirs.embedding.weight.T).argmax(1)
    assert (ours.encode(z).flatten() != by_product).any()
    assert torch.equal(ours.encode(z).flatten(), copy.deepcopy(theirs).eval()(z)[2])
    for step in range(3):
        assert_same_step(theirs, ours, noise(2, 8, 4, 5, seed=step))
        torch.testing.assert_close(ours.codebook, theirs.embedding.weight.data, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q: setattr(q, "l2_normalize", True), "l2_normalize"),
        (lambda q: setattr(q, "norm", nn.LayerNorm(4)), "norm"),
        (lambda q: q.register_parameter("temperature", nn.Parameter(torch.ones(1))), "temperature"),
        (lambda q: setattr(q.embedding, "max_norm", 1.0), "embedding.max_norm"),
        (lambda q: setattr(q.embedding, "padding_idx", 3), "embedding.padding_idx"),
    ],
)
def test_what_a_copied_class_has_beside_the_known_options_is_refused_by_name(change, named):
    quantizer = NormEMAVectorQuantizer(32, 4)
    change(quantizer)
    with pytest.raises(Unsupported, match=named):
        NormEMAAdapter(quantizer)
    quantizer = NormEMAVectorQuantizer(32, 4)
    quantizer.l2_normalize = False
    NormEMAAdapter(quantizer)


def test_options_of_the_caller_win_over_those_of_the_replaced_module():
    model = nn.Sequential(NormEMAVectorQuantizer(32, 8))
    given = {"dead_after": 50.0, "restart_below": 0.2, "decay": 0.5, "commitment_weight": 0.25}
    replace_quantizers(model, {NormEMAVectorQuantizer: NormEMAAdapter}, **given)
    assert {name: getattr(model[0], name) for name in given} == given
    averages = NormEMAAdapter(NormEMAVectorQuantizer(32, 8), learning="sum_ema")
    with pytest.raises(RuntimeError, match="cannot be forgotten"):
        averages.reset_cluster_size()
