"""replace_quantizers against the real packages, and against minimal classes with the interfaces that callers name."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast import (
    EmbeddingAdapter,
    FusedVectorQuantizer,
    NormEMAAdapter,
    Unsupported,
    VectorQuantizeAdapter,
    replace_quantizers,
)

from ..support.quantizers import noise

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, sums in another order


def assert_same_step(theirs: nn.Module, ours: nn.Module, z: Tensor, *args: object, **kwargs: object) -> None:
    """Outputs of any structure, and the gradients of the input and of all parameters."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        x = z.clone().requires_grad_()
        out = module(x, *args, **kwargs)
        quantized, *rest = out
        loss = next(t for t in rest if t.dim() == 0)
        total = loss + (quantized * noise(*quantized.shape, seed=9)).sum()
        if total.requires_grad:
            total.backward()
        gradients = {name.rsplit(".", 1)[-1]: p.grad for name, p in module.named_parameters() if p.requires_grad}
        results.append((out, x.grad, gradients))
    (a, grad_a, params_a), (b, grad_b, params_b) = results
    torch.testing.assert_close(b, a, **TOLERANCE)
    torch.testing.assert_close(grad_b, grad_a, **TOLERANCE)
    assert params_a.keys() == params_b.keys()
    torch.testing.assert_close(params_b, params_a, **TOLERANCE)


def assert_same_steps(theirs: nn.Module, ours: nn.Module, shape: tuple[int, ...]) -> None:
    """20 of them, by gradient."""
    for step in range(20):
        assert_same_step(theirs, ours, noise(*shape, seed=step))
        for parameter in (*theirs.parameters(), *ours.parameters()):
            parameter.data.sub_(parameter.grad, alpha=0.1)


# vector-quantize-pytorch -------------------------------------------------------------------------------------------


def vector_quantize(**options: object) -> nn.Module:
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    return package.VectorQuantize(**{"dim": 16, "codebook_size": 32, **options})


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3, 20, 16)),
        ({"rotation_trick": False, "decay": 0.95, "eps": 1e-3, "commitment_weight": 0.25}, (3, 20, 16)),
        ({"use_cosine_sim": True}, (3, 20, 16)),
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


# diffusers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vq_model() -> nn.Module:
    models = pytest.importorskip("diffusers.models.autoencoders.vq_model")
    torch.manual_seed(0)
    model = models.VQModel(
        block_out_channels=(8,), latent_channels=4, num_vq_embeddings=32, vq_embed_dim=4, norm_num_groups=4
    )
    model.quantize.embedding.weight.data.normal_()
    return model


def test_diffusers_vq_model_runs_unchanged_and_agrees(vq_model):
    theirs, ours = copy.deepcopy(vq_model), copy.deepcopy(vq_model)
    parameter = ours.quantize.embedding.weight
    assert replace_quantizers(ours) is ours
    assert type(ours.quantize) is not type(theirs.quantize) and ours.quantize.embedding.weight is parameter
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    images = noise(2, 3, 16, 16)
    outputs = [model(images) for model in (theirs, ours)]
    for a, b in zip(*(out.to_tuple() for out in outputs), strict=True):
        torch.testing.assert_close(b, a, **TOLERANCE)
    for out in outputs:
        (out.sample.square().mean() + out.commit_loss.mean()).backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **TOLERANCE, msg=name)
    shape = (2, 16, 16, 4)
    codes = ours.quantize.get_codebook_entry(torch.arange(512) % 32, shape)
    torch.testing.assert_close(codes, theirs.quantize.get_codebook_entry(torch.arange(512) % 32, shape))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("unknown_index", ["random", "extra", 1, None])
def test_diffusers_quantizer_agrees_with_both_betas_and_remaps(vq_model, tmp_path, legacy, unknown_index):
    numpy = pytest.importorskip("numpy")
    remap = None
    if unknown_index is not None:
        remap = str(tmp_path / "used.npy")
        numpy.save(remap, numpy.arange(32)[::-1] if unknown_index == "random" else numpy.array([5, 3, 17, 8]))
    options = {"remap": remap, "unknown_index": unknown_index, "legacy": legacy, "sane_index_shape": legacy}
    theirs = type(vq_model.quantize)(32, 4, 0.25, **options)
    theirs.embedding.weight.data.normal_()
    ours = replace_quantizers(copy.deepcopy(theirs))
    if unknown_index == "random" or remap is None:
        assert_same_steps(theirs, ours, (2, 4, 6, 5))
    assert_same_step(theirs, ours, noise(2, 4, 6, 5))
    if remap:
        indices = torch.randint(0, 4, (10,))
        expected = theirs.get_codebook_entry(indices.clone(), (1, 2, 5, 4))
        torch.testing.assert_close(ours.get_codebook_entry(indices, (1, 2, 5, 4)), expected)


# Classes that the caller names: the smallest ones with these interfaces ----------------------------------------------


class NormEMAVectorQuantizer(nn.Module):
    """BEiT v2's interface and formulas."""

    def __init__(self, num_tokens: int, codebook_dim: int, beta: float = 1.0, decay: float = 0.9):
        super().__init__()
        self.num_tokens, self.codebook_dim, self.beta, self.decay = num_tokens, codebook_dim, beta, decay
        self.embedding = nn.Module()
        start = F.normalize(noise(num_tokens, codebook_dim, seed=7), dim=-1)
        self.embedding.weight = nn.Parameter(start, requires_grad=False)
        self.embedding.register_buffer("cluster_size", torch.zeros(num_tokens))
        self.embedding.register_buffer("embed_avg", start.clone())
        self.embedding.register_buffer("initted", torch.ones(1))
        self.embedding.update = True
        self.register_buffer("cluster_size", torch.zeros(num_tokens))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.normalize(z.movedim(1, -1), dim=-1)
        weight = self.embedding.weight
        indices = (weight.square().sum(1) - 2 * y.flatten(0, -2) @ weight.T).argmin(1)
        one_hot = F.one_hot(indices, self.num_tokens).float()
        codes = (one_hot @ weight).view(y.shape)
        bins = one_hot.sum(0)
        if self.embedding.update or not self.training:
            self.cluster_size.lerp_(bins, 1 - self.decay)
        if self.embedding.update and self.training:
            sums = one_hot.T @ y.detach().flatten(0, -2)
            mean = torch.where(bins[:, None] > 0, F.normalize(sums, dim=-1), weight)
            weight.data = F.normalize(self.decay * weight + (1 - self.decay) * mean, dim=-1)
        loss = self.beta * F.mse_loss(codes.detach(), y)
        return (y + (codes - y).detach()).movedim(-1, 1), loss, indices


class VectorQuantizer2(nn.Module):
    """taming-transformers' interface and formulas."""

    def __init__(self, n_e: int, e_dim: int, beta: float, legacy: bool = True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.remap, self.re_embed, self.sane_index_shape = None, n_e, False

    def forward(self, z: Tensor, temp=None, rescale_logits=False, return_logits=False):
        last = z.movedim(1, -1)
        indices = torch.cdist(last.reshape(-1, self.e_dim), self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(last.shape)
        commitment, codebook = F.mse_loss(codes.detach(), last), F.mse_loss(codes, last.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return (last + (codes - last).detach()).movedim(-1, 1), loss, (None, None, indices)


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


@pytest.mark.parametrize("legacy", [True, False])
def test_tamings_quantizer_agrees(legacy):
    theirs = VectorQuantizer2(32, 4, 0.25, legacy)
    ours = replace_quantizers(copy.deepcopy(theirs), {VectorQuantizer2: EmbeddingAdapter})
    assert_same_steps(theirs, ours, (2, 4, 5, 6))
    assert_same_step(theirs, ours, noise(2, 4, 5, 6), temp=1.0)
    codes, indices = ours.embed_code(torch.tensor([[[3, 1]]])), torch.tensor([3, 1])
    torch.testing.assert_close(codes[0, :, 0].T, theirs.embedding.weight[indices])
    with pytest.raises(Unsupported, match="return_logits"):
        ours(noise(2, 4, 5, 6), return_logits=True)


def test_a_shared_quantizer_stays_shared_and_subclasses_are_left_alone():
    class Subclass(VectorQuantizer2):
        pass

    shared = VectorQuantizer2(32, 4, 0.25)
    model = nn.ModuleList([shared, nn.Sequential(shared), Subclass(32, 4, 0.25)]).eval()
    replace_quantizers(model, {VectorQuantizer2: EmbeddingAdapter})
    assert model[0] is not shared and model[1][0] is model[0] and type(model[2]) is Subclass
    assert not model[0].training


@pytest.mark.parametrize(
    ("cls", "adapter"), [(VectorQuantizer2, EmbeddingAdapter), (NormEMAVectorQuantizer, NormEMAAdapter)]
)
def test_what_is_replaced_already_is_left_alone(cls, adapter):
    model = nn.Sequential(cls(32, 4, 0.25))
    adapters = {cls: adapter}
    ours = replace_quantizers(model, adapters)[0]
    with pytest.raises(ValueError, match="replaced already"):
        replace_quantizers(model, adapters)
    model.append(cls(32, 4, 0.25))
    replace_quantizers(model, adapters)
    assert model[0] is ours and type(model[1]) is type(ours)


def test_a_model_without_quantizers_and_a_wrong_policy_are_errors():
    with pytest.raises(ValueError, match="holds no quantizer"):
        replace_quantizers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unsupported must be"):
        replace_quantizers(nn.Linear(2, 2), unsupported="ignore")
