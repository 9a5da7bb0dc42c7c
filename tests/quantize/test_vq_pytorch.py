"""Modules of vector-quantize-pytorch and their replacements, side by side over trainings of 20 steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from beitv2_fast import Unsupported, replace_quantizers

from ..support.quantizers import noise
from ..support.replaced import TOLERANCE, vector_quantize

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
BY_SGD = {"in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By the original's names; codebooks as [codebooks, K, D]."""
    found = {}
    for name, parameter in module.named_parameters():
        name = name.replace("_codebook.vq_bridge", "transform")
        before, last = name[: name.rfind(".") + 1], name.split(".")[-1]
        if parameter.grad is not None:
            shape = (-1, *parameter.shape[-2:]) if last in ("codebook", "embed") else parameter.shape
            found[before.removesuffix("_codebook.") + last.replace("embed", "codebook")] = parameter.grad.view(shape)
    return found


def assert_same_training(
    theirs: nn.Module,
    ours: nn.Module,
    shape: tuple[int, ...] = (3, 20, 16),
    steps: int = 20,
    *,
    grad: bool = True,
    **call,
) -> None:
    """Outputs, gradients and codebooks over the steps of an optimizer of each, then what both say in eval mode."""
    modules = theirs, ours
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) if list(m.parameters()) else None for m in modules]
    for step in range(steps):
        results = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            x = (0.5 * noise(*shape, seed=step)).requires_grad_(grad)
            torch.manual_seed(step)
            out = module(x, **call)
            total = out[2].sum() + (out[0] - noise(*out[0].shape, seed=99)).square().sum() / 20
            if total.requires_grad:
                total.backward()
            results.append((out, x.grad, gradients(module)))
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        (a, b) = results
        torch.testing.assert_close(b[0], a[0], **TOLERANCE, msg=lambda m, step=step: f"step {step}: {m}")
        torch.testing.assert_close(b[1:], a[1:], **TOLERANCE, msg=lambda m, step=step: f"step {step}: {m}")
    for module in modules:
        module.eval()
    outputs = []
    for module in modules:
        torch.manual_seed(0)
        outputs.append(module(noise(*shape, seed=55), **call))
    torch.testing.assert_close(outputs[1], outputs[0], **TOLERANCE)


def swapped(**options: object) -> tuple[nn.Module, nn.Module]:
    theirs = vector_quantize(**options)
    return theirs, replace_quantizers(copy.deepcopy(theirs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"commitment_weight": 0.0},
        {"commitment_weight": 0.0, "rotation_trick": False},
        {"commitment_weight": 0.25, "rotation_trick": False},
        {"sync_update_v": 0.5, "rotation_trick": False},
        {"sync_update_v": 1.0, "heads": 2, "codebook_dim": 4},
        {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
        {"route_gradients_to_input": False},
    ],
    ids=str,
)
def test_a_codebook_that_learns_by_gradient_agrees(options):
    assert_same_training(*swapped(**LEARNABLE, **options), return_loss_breakdown=True)


@pytest.mark.parametrize("options", [LEARNABLE, {**LEARNABLE, "codebook_dim": 4}, {"codebook_dim": 4}], ids=str)
def test_where_the_input_needs_no_gradient_the_codes_get_it(options):
    assert_same_training(*swapped(**options), grad=False)


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"codebook_dim": 4}], ids=str)
def test_an_input_to_which_no_gradient_is_routed_has_that_of_the_commitment(options):
    assert_same_training(*swapped(route_gradients_to_input=False, **options), steps=3)


def test_a_loss_that_depends_on_nothing_can_be_differentiated_all_the_same():
    for theirs, ours in (swapped(), swapped(commitment_weight=0.0)):
        losses = [module(noise(3, 20, 16))[2] for module in (theirs, ours)]
        torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
        for loss in losses:
            loss.backward()
        assert not ours.eval()(noise(3, 20, 16))[2].requires_grad


def test_a_codebook_that_learns_by_gradient_gets_it_in_eval_mode_too():
    theirs, ours = (module.eval() for module in swapped(**LEARNABLE))
    for module in (theirs, ours):
        module(noise(3, 20, 16))[0].square().sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), **TOLERANCE)


def test_freezing_a_call_keeps_a_learnt_codebook_out_of_the_loss():
    theirs, ours = swapped(**LEARNABLE)
    assert_same_training(theirs, ours, steps=3, freeze_codebook=True)


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({}, True),
        ({"commitment_weight": 0.0}, True),
        ({"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True}, False),
    ],
)
def test_an_optimizer_in_place_steps_before_the_codes_are_chosen(options, masked):
    theirs, ours = swapped(**LEARNABLE, **BY_SGD, **options)
    call = {"lens": torch.tensor([20, 7, 1])} if masked else {}
    before = ours.codebook.detach().clone()
    assert_same_training(theirs, ours, return_loss_breakdown=True, **call)
    assert (ours.codebook - before).abs().max() > 0.1


def test_the_moments_of_an_optimizer_in_place_move_with_the_codebook():
    theirs = vector_quantize(**LEARNABLE, in_place_codebook_optimizer=torch.optim.Adam)
    theirs(noise(3, 20, 16))
    ours = replace_quantizers(copy.deepcopy(theirs))
    (group,) = ours.in_place_codebook_optimizer.param_groups
    assert group["params"][0] is ours.codebook
    assert_same_training(theirs, ours, steps=3)
    again = copy.deepcopy(ours).train()
    assert again.in_place_codebook_optimizer.param_groups[0]["params"][0] is again.codebook


def test_an_optimizer_in_place_can_wait_to_be_called():
    theirs, ours = swapped(**LEARNABLE, **BY_SGD, manual_in_place_optimizer_update=True)
    for step in range(2):
        for module in (theirs, ours):
            module(noise(3, 20, 16, seed=step))
            module.update_in_place_optimizer()
    torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, LEARNABLE], ids=str)
def test_dead_codes_restart_at_the_threshold(options):
    ours = replace_quantizers(vector_quantize(**options, threshold_ema_dead_code=2)).train()
    for step in range(24):
        ours(noise(3, 40, 16, seed=step))
    assert (ours.cluster_size >= 1).all() and ours.usage()["replaced_codes"] > 0


@pytest.mark.parametrize(
    "options",
    [
        LEARNABLE,
        {},
        {"use_cosine_sim": True},
        {"orthogonal_reg_active_codes_only": True},
        {"orthogonal_reg_max_codes": 8},
        {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
    ],
    ids=str,
)
def test_orthogonal_regularization_agrees(options):
    theirs, ours = swapped(orthogonal_reg_weight=10.0, **options)
    assert_same_training(theirs, ours, return_loss_breakdown=True)


def test_codes_of_zeros_count_as_wrong_in_orthogonal_regularization():
    _, ours = swapped(orthogonal_reg_weight=1.0, commitment_weight=0.0, rotation_trick=False, **LEARNABLE)
    with torch.no_grad():
        ours.codebook.copy_(torch.eye(32, 16))  # half of the products of codes with themselves are 0
    torch.testing.assert_close(ours(noise(3, 20, 16))[2], torch.tensor(16 / 32**2))


def test_without_active_codes_orthogonal_regularization_is_0():
    _, ours = swapped(orthogonal_reg_weight=1.0, orthogonal_reg_active_codes_only=True)
    loss = ours(noise(3, 20, 16), mask=torch.zeros(3, 20, dtype=torch.bool))[2]
    loss.backward()
    assert loss == 0 and not ours.codebook.grad.any()


@pytest.mark.parametrize(
    ("weight", "options", "masked"),
    [
        (torch.linspace(0, 1, 32), {}, True),
        (lambda sums, sizes: (sizes > 1).float(), {}, True),
        (0.5, {"use_cosine_sim": True}, False),
        (torch.rand(2, 32), {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True}, False),
        (lambda sums, sizes: sums[..., 0].sigmoid(), {"use_cosine_sim": True}, False),
    ],
)
def test_weights_of_the_ema_update_agree(weight, options, masked):
    call = {"mask": torch.arange(20) < torch.tensor([[20], [7], [1]])} if masked else {}
    theirs, ours = swapped(**options)
    assert_same_training(theirs, ours, ema_update_weight=weight, **call)
    torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)
    torch.testing.assert_close(ours.cluster_size.view(-1, 32), theirs._codebook.cluster_size, **TOLERANCE)


def test_a_manual_ema_update_keeps_the_codes_until_it_is_called():
    theirs, ours = swapped(manual_ema_update=True)
    before = ours.codebook.clone()
    assert_same_training(theirs, ours, steps=3)
    assert torch.equal(ours.codebook, before)
    theirs._codebook.update_ema()
    ours._codebook.update_ema()
    torch.testing.assert_close(ours._codebook.embed, theirs._codebook.embed, **TOLERANCE)


def test_straight_through_of_gumbel_codes_is_the_plain_one_in_the_original_too():
    assert_same_training(*swapped(straight_through=True, rotation_trick=False), steps=3)


def test_mask_and_lens_together_are_refused():
    ours = replace_quantizers(vector_quantize())
    with pytest.raises(Unsupported, match="lens"):
        ours(noise(2, 3, 16), mask=torch.ones(2, 3, dtype=torch.bool), lens=torch.tensor([1, 2]))


def residual(name: str = "ResidualVQ", **options: object) -> tuple[nn.Module, nn.Module]:
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    theirs = getattr(package, name)(**{"dim": 16, "codebook_size": 32, "num_quantizers": 3, **options})
    return theirs, replace_quantizers(copy.deepcopy(theirs))


@pytest.mark.parametrize(
    "options",
    [
        {"shared_codebook": True},
        {"shared_codebook": True, **LEARNABLE},
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
        {"codebook_size": (32, 16, 8), "num_quantizers": None},
        {"name": "GroupedResidualVQ", "groups": 2, "shared_codebook": True, "quantize_dropout": True},
        {"name": "GroupedResidualVQ", "groups": 2, "codebook_dim": 4, "shared_codebook": True, "rotation_trick": False},
        {"diveq": True, "dim": 16},
        LEARNABLE,
    ],
    ids=str,
)
def test_residual_stacks_agree(options):
    theirs, ours = residual(**options)
    assert_same_training(theirs, ours)
    indices = ours(noise(2, 7, 16))[1]
    codes = [module.get_codes_from_indices(indices) for module in (theirs, ours)]
    torch.testing.assert_close(codes[1], codes[0], **TOLERANCE)


def test_stages_that_share_a_codebook_become_one_module():
    _, ours = residual(shared_codebook=True)
    assert len({*ours.layers}) == 1


def test_an_implicit_neural_codebook_is_refused_at_the_replacement():
    with pytest.raises(Unsupported, match="implicit_neural_codebook of the ResidualVQ"):
        residual(implicit_neural_codebook=True)


@pytest.mark.parametrize("shape", [(3, 20, 16), (2, 4, 5, 16)])
@pytest.mark.parametrize("options", [{}, {"rotation_trick": False, "commitment_weight": 0.5, "frozen_codebook_dim": 8}])
def test_sim_vq_agrees_under_its_own_names(options, shape):
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    theirs = package.SimVQ(dim=16, codebook_size=32, **options)
    ours = replace_quantizers(copy.deepcopy(theirs))
    assert type(ours) is not type(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same_training(theirs, ours, shape)
    indices = ours(noise(*shape))[1]
    torch.testing.assert_close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices), **TOLERANCE)


def test_sim_vq_agrees_on_maps_with_the_channels_first():
    package = pytest.importorskip("vector_quantize_pytorch")
    transform = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    theirs = package.SimVQ(dim=16, codebook_size=32, codebook_transform=transform, channel_first=True)
    assert_same_training(theirs, replace_quantizers(copy.deepcopy(theirs)), (2, 16, 4, 5))


def test_sim_vq_decodes_what_it_searched_where_a_transform_looks_at_all_codes():
    package = pytest.importorskip("vector_quantize_pytorch")
    transform = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Softmax(dim=0))
    ours = replace_quantizers(package.SimVQ(16, 32, codebook_transform=transform, rotation_trick=False)).eval()
    quantized, indices, _ = ours(noise(3, 20, 16))
    torch.testing.assert_close(ours.indices_to_codes(indices), quantized)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_residual_stack_of_sim_vq_agrees(dropout):
    theirs, ours = residual("ResidualSimVQ", quantize_dropout=dropout)
    assert_same_training(theirs, ours)
    indices = ours(noise(2, 7, 16))[1]
    codes = [module.get_codes_from_indices(indices) for module in (theirs, ours)]
    torch.testing.assert_close(codes[1], codes[0], **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 1, "eval_beam_size": 4, "commitment_weight": 0.0},
        {"beam_size": 2, "shared_codebook": True, "rotation_trick": False, "quantize_dropout": True},
        {"beam_size": 2, "use_cosine_sim": True, "commitment_weight": 0.5},
        {"beam_size": 2, "beam_score_quantizer_weights": [1.0, 0.5, 2.0], **LEARNABLE},
        {"name": "GroupedResidualVQ", "groups": 2, "beam_size": 5},
    ],
)
def test_a_beam_search_agrees(options):
    theirs, ours = residual(**options)
    assert_same_training(theirs, ours)
    if "name" not in options:
        x, mask = noise(2, 7, 16), torch.arange(7) < torch.tensor([[7], [3]])
        torch.testing.assert_close(ours(x, mask=mask), theirs(x, mask=mask), **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"channel_last": False}, (3, 16, 20)), ({"accept_image_fmap": True, "codebook_dim": 4}, (2, 16, 4, 5))],
)
def test_the_k_nearest_codes_of_maps_agree(options, shape):
    theirs, ours = swapped(**options)
    for training in (True, False):
        results = [module.train(training)(noise(*shape), topk=3) for module in (theirs, ours)]
        torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_k_nearest_codes_of_a_call_agree(zeros):
    theirs, ours = swapped(return_zeros_for_masked_padding=zeros)
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    for module in (theirs, ours):
        module.eval()
    assert [t.shape for t in ours(noise(2, 0, 16), topk=3)] == [(2, 0, 3, 16), (2, 0, 3), (2, 0, 3)]
    for call in ({"topk": 3}, {"topk": 99}, {"topk": 3, "mask": mask}):
        torch.testing.assert_close(ours(noise(3, 20, 16), **call), theirs(noise(3, 20, 16), **call), **TOLERANCE)


@pytest.mark.parametrize("in_place", [{}, BY_SGD])
def test_a_vq_bridge_agrees(in_place):
    bridge = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    theirs, ours = swapped(vq_bridge=bridge, rotation_trick=False, **in_place)
    assert_same_training(theirs, ours)
    quantized, indices, _ = ours(noise(3, 20, 16))
    torch.testing.assert_close(ours.get_codes_from_indices(indices), quantized)


def test_random_projections_agree():
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs = package.RandomProjectionQuantizer(dim=16, codebook_size=32, codebook_dim=8, num_codebooks=2)
    ours = replace_quantizers(copy.deepcopy(theirs))
    assert torch.equal(ours(noise(3, 20, 16)), theirs(noise(3, 20, 16)))


@pytest.mark.parametrize("shared", [True, False])
def test_hierarchical_quantizers_agree(shared):
    package = pytest.importorskip("vector_quantize_pytorch")
    options = {"scales": (1, 2, 4), "accept_image_fmap": True, "kmeans_init": False, "threshold_ema_dead_code": 0}
    torch.manual_seed(0)
    theirs = package.HierarchicalVQ(dim=16, codebook_size=32, shared_codebook=shared, **options)
    ours = replace_quantizers(copy.deepcopy(theirs))
    assert_same_training(theirs, ours, (2, 16, 4, 4), steps=5)
    indices = ours(noise(2, 16, 4, 4))[1]
    codes = [module.get_output_from_indices(indices) for module in (theirs, ours)]
    torch.testing.assert_close(codes[1], codes[0], **TOLERANCE)
