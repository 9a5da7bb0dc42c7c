"""EmbeddingAdapter against diffusers' quantizer, and against a class with taming-transformers' interface."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from beitv2_fast import EmbeddingAdapter, Unsupported, replace_quantizers

from ..support.other_quantizers import VectorQuantizer2
from ..support.quantizers import noise
from ..support.replaced import TOLERANCE, assert_same_step, assert_same_steps


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
