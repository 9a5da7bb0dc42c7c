"""Every option of vector-quantize-pytorch's VectorQuantize: kept, without effect, or refused by its name."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from beitv2_fast import Unsupported, VectorQuantizeAdapter, replace_quantizers

from ..support.quantizers import noise
from ..support.replaced import TOLERANCE, assert_same_step, vector_quantize


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3, 20, 16)),
        ({"rotation_trick": False, "decay": 0.95, "eps": 1e-3, "commitment_weight": 0.25}, (3, 20, 16)),
        ({"kmeans_iters": 0, "threshold_ema_dead_code": -1, "use_cosine_sim": True}, (3, 20, 16)),
        ({"use_cosine_sim": True, "rotation_trick": False}, (7, 16)),
        ({"codebook_dim": 4, "layernorm_after_project_in": True}, (3, 20, 16)),
        ({"heads": 4, "codebook_dim": 4}, (3, 20, 16)),
        ({"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True, "use_cosine_sim": True}, (3, 20, 16)),
        ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 4}, (2, 16, 4, 5)),
        ({"accept_3d_fmap": True}, (2, 16, 2, 3, 4)),
        ({"channel_last": False, "codebook_dim": 8}, (3, 16, 20)),
        ({"freeze_codebook": True, "commitment_weight": 0.0}, (3, 20, 16)),
    ],
)
def test_vector_quantize_pytorch_agrees_over_training_steps_and_in_eval(options, shape):
    theirs = vector_quantize(**options)
    ours = replace_quantizers(copy.deepcopy(theirs))
    assert type(ours) is VectorQuantizeAdapter
    for step in range(4):
        assert_same_step(theirs, ours, 0.5 * noise(*shape, seed=step))
        torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)
    if ours.embed_avg is not None:
        torch.testing.assert_close(ours.cluster_size, theirs._codebook.cluster_size.squeeze(0), **TOLERANCE)
    theirs.eval()
    ours.eval()
    assert_same_step(theirs, ours, noise(*shape, seed=8))
    torch.testing.assert_close(ours.codebook, theirs.codebook, **TOLERANCE)
    quantized, indices, _ = ours(noise(*shape, seed=8))
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    if "heads" not in options and "channel_last" not in options:  # where theirs gives another shape, or fails
        torch.testing.assert_close(theirs.get_output_from_indices(indices), quantized, **TOLERANCE)


@pytest.mark.parametrize("zeros", [True, False])
def test_vector_quantize_pytorch_agrees_on_padded_sequences(zeros):
    theirs = vector_quantize(return_zeros_for_masked_padding=zeros)
    ours = replace_quantizers(copy.deepcopy(theirs))
    z, lens = noise(3, 10, 16), torch.tensor([10, 4, 1])
    assert_same_step(theirs, ours, z, lens=lens)
    assert_same_step(theirs, ours, z, mask=torch.arange(10) < lens[:, None], return_loss_breakdown=True)
    torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)


# Every option of VectorQuantize: kept (and compared above or below), of no effect without one that is refused, refused.
KEPT = """dim codebook_size codebook_dim heads separate_codebook_per_head decay eps freeze_codebook kmeans_init
    kmeans_iters use_cosine_sim layernorm_after_project_in threshold_ema_dead_code channel_last accept_image_fmap
    accept_3d_fmap commitment_weight rotation_trick return_zeros_for_masked_padding learnable_codebook sync_update_v
    in_place_codebook_optimizer manual_in_place_optimizer_update manual_ema_update route_gradients_to_input
    straight_through orthogonal_reg_weight orthogonal_reg_active_codes_only orthogonal_reg_max_codes sync_codebook
    vq_bridge stochastic_sample_codes sample_codebook_temp
    codebook_diversity_loss_weight codebook_diversity_temperature commitment_use_cross_entropy_loss"""
WITHOUT_EFFECT = {
    "directional_reparam_variance": "directional_reparam",
    "sync_affine_param": "affine_param",
    "affine_param_batch_decay": "affine_param",
    "affine_param_codebook_decay": "affine_param",
}
REFUSED = {
    "affine_param": {"affine_param": True},
    "stochastic_sample_codes with in_place_codebook_optimizer": {
        "in_place_codebook_optimizer": torch.optim.Adam,
        "stochastic_sample_codes": True,
        "learnable_codebook": True,
        "ema_update": False,
    },
    "directional_reparam": {"directional_reparam": True, "threshold_ema_dead_code": 2},
    "in_place_codebook_optimizer without learnable_codebook": {
        "in_place_codebook_optimizer": torch.optim.Adam,
        "orthogonal_reg_weight": 1.0,
    },
    "threshold_ema_dead_code with vq_bridge": {"vq_bridge": nn.Linear(16, 16), "threshold_ema_dead_code": 2},
    "kmeans_init with vq_bridge": {"vq_bridge": nn.Linear(16, 16), "kmeans_init": True},
    "ema_update=False with threshold_ema_dead_code": {"ema_update": False, "threshold_ema_dead_code": 2},
    "sync_kmeans=False": {"sync_kmeans": False, "sync_codebook": True},
    "codebook_diversity_temperature of 0 or less": {
        "codebook_diversity_temperature": 0.0,
        "codebook_diversity_loss_weight": 1.0,
    },
}


def test_every_option_of_vector_quantize_pytorch_has_been_thought_of():
    package = pytest.importorskip("vector_quantize_pytorch")
    names = set(inspect.signature(package.VectorQuantize.__init__).parameters) - {"self"}
    assert names == {*KEPT.split(), *WITHOUT_EFFECT, *(name.split()[0].split("=")[0] for name in REFUSED)}
    assert set(WITHOUT_EFFECT.values()) <= REFUSED.keys()


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_options_of_what_is_not_used_have_no_effect(option):
    value = True if option == "sync_affine_param" else 3
    theirs = vector_quantize(**{option: value})
    assert_same_step(theirs, replace_quantizers(copy.deepcopy(theirs)), noise(3, 20, 16))


def test_among_ranks_a_module_that_keeps_its_own_statistics_goes_on_to_do_so(monkeypatch):
    monkeypatch.setattr("beitv2_fast.quantize.vq_pytorch.world", lambda: (0, 2))
    assert replace_quantizers(vector_quantize(sync_codebook=False)).sync is False
    assert replace_quantizers(vector_quantize(sync_codebook=True)).sync is True


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_codebook_of_a_call_wins_over_that_of_the_module(frozen):
    theirs = vector_quantize(freeze_codebook=frozen)
    ours = replace_quantizers(copy.deepcopy(theirs))
    for step, call in enumerate((not frozen, None, frozen, not frozen)):
        before = ours.codebook.clone()
        assert_same_step(theirs, ours, noise(3, 20, 16, seed=step), freeze_codebook=call)
        assert torch.equal(ours.codebook, before) == (frozen if call is None else call)
        torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)
    assert ours.frozen == frozen


def test_a_frozen_module_of_vector_quantize_pytorch_learns_when_it_is_thawed():
    theirs = vector_quantize(freeze_codebook=True, kmeans_init=False)
    ours = replace_quantizers(copy.deepcopy(theirs))
    theirs.freeze_codebook = False
    ours.thaw()
    assert_same_step(theirs, ours, noise(3, 20, 16))
    torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)
    for module in (theirs, ours):
        module.freeze_codebook = True
    before = ours.codebook.clone()
    assert_same_step(theirs, ours, noise(3, 20, 16, seed=1))
    assert ours.frozen and torch.equal(ours.codebook, before)


def test_cosine_codes_of_other_lengths_stay_the_originals_also_through_a_state_dict():
    theirs = vector_quantize(use_cosine_sim=True, freeze_codebook=True)
    theirs._codebook.embed.mul_(torch.rand(32, 1) + 0.1)
    ours, loaded = (replace_quantizers(copy.deepcopy(theirs)) for _ in range(2))
    loaded.codebook.zero_()
    loaded.load_state_dict(ours.state_dict())
    for module in (ours, loaded):
        assert_same_step(theirs, module, noise(3, 20, 16))
        assert_same_step(copy.deepcopy(theirs).eval(), copy.deepcopy(module).eval(), noise(3, 20, 16))


@pytest.mark.parametrize(("named", "options"), REFUSED.items(), ids=REFUSED)
def test_options_without_a_counterpart_are_named_with_the_module_and_nothing_changes(named, options):
    model = nn.Sequential(vector_quantize(), nn.ModuleDict({"vq": vector_quantize(**options)}))
    before = list(model.modules())
    with pytest.raises(Unsupported, match=rf"1\.vq \(VectorQuantize\).*{named}"):
        replace_quantizers(model)
    assert list(model.modules()) == before
    with pytest.warns(UserWarning, match=rf"1\.vq.*{named}"):
        replace_quantizers(model, unsupported="keep")
    assert type(model[0]) is VectorQuantizeAdapter and model[1]["vq"] in before


def test_a_module_of_vector_quantize_pytorch_with_a_forward_of_its_own_is_refused():
    theirs = vector_quantize()
    theirs.forward = theirs.forward  # as the hooks of accelerate do
    with pytest.raises(Unsupported, match="forward is set on the module itself"):
        replace_quantizers(theirs)


def test_arguments_of_forward_without_a_counterpart_are_refused():
    ours = replace_quantizers(vector_quantize())
    with pytest.raises(Unsupported, match="topk with heads"):
        replace_quantizers(vector_quantize(heads=2))(noise(2, 3, 16), topk=2)
    ours(noise(2, 3, 16), sample_codebook_temp=0.1, accum_ema_update=False)
