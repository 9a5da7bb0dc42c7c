"""A codebook that is searched, and learns, through a transform: values, gradients, states."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beitv2_fast import FusedVectorQuantizer, ResidualVectorQuantizer

from ..support.quantizers import noise

OPTIONS = [
    {"metric": "euclidean"},
    {"metric": "cosine", "commitment_weight": 0.25, "codebook_weight": 2.0},
    {"metric": "euclidean", "learning": "gradient", "stored_dim": 5},
    {"metric": "cosine", "heads": 2, "stored_dim": 5, "learning": "gradient"},
]


def transformed(**options: object) -> FusedVectorQuantizer:
    torch.manual_seed(0)
    width = 8 // options.get("heads", 1)
    transform = nn.Linear(options.get("stored_dim", width), width, bias=False)
    return FusedVectorQuantizer(16, 8, transform=transform, **options).train()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(options):
    quantizer = transformed(**options)
    x = noise(40, 8).requires_grad_()
    out = quantizer(x)
    stored = quantizer.codebook.detach().clone().requires_grad_()
    weight = quantizer.transform.weight.detach().clone().requires_grad_()
    codes, y, groups = (
        (stored @ weight.T).view(-1, 16, weight.shape[0]),
        noise(40, 8).requires_grad_(),
        quantizer.groups,
    )
    parts = y.view(40, groups, -1)
    if quantizer.metric == "cosine":
        codes, parts = F.normalize(codes, dim=-1), F.normalize(parts, dim=-1)
    indices = torch.cdist(parts.transpose(0, 1), codes).argmin(-1)  # [G, N]
    chosen = torch.stack([codes[g][indices[g]] for g in range(groups)], dim=1)
    loss = quantizer.commitment_weight * F.mse_loss(parts, chosen.detach())
    loss = loss + quantizer.codebook_weight * F.mse_loss(chosen, parts.detach())
    assert torch.equal(out.indices.view(40, -1), indices.T)
    torch.testing.assert_close(out.quantized, chosen.reshape(40, 8))
    torch.testing.assert_close(out.loss, loss)
    upstream = noise(40, 8, seed=3)
    (out.loss + (out.quantized * upstream).sum()).backward()
    (loss + (parts.reshape(40, 8) * upstream).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(quantizer.transform.weight.grad, weight.grad)
    if quantizer.learning == "gradient":
        torch.testing.assert_close(quantizer.codebook.grad, stored.grad)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_codebook_is_kept_and_decode_and_a_state_dict_find_the_same_codes(options):
    quantizer, other = transformed(**options), transformed(seed=5, **options)
    before = quantizer.codebook.detach().clone()
    for step in range(10):
        quantizer(noise(40, 8, seed=step))
    assert torch.equal(quantizer.codebook, before) and quantizer.usage()["replaced_codes"] == 0
    other.load_state_dict(quantizer.state_dict())
    out = quantizer.eval()(noise(40, 8))
    assert torch.equal(quantizer.encode(noise(40, 8)), out.indices)
    torch.testing.assert_close(other.decode(out.indices), out.quantized)


def test_frozen_neither_transform_nor_loss_has_a_gradient_for_the_codes():
    quantizer = transformed(learning="gradient", metric="euclidean")
    quantizer.freeze()
    out = quantizer(noise(40, 8).requires_grad_())
    out.loss.backward()
    assert all(p.grad is None for p in quantizer.parameters())
    torch.testing.assert_close(out.loss, F.mse_loss(out.quantized, noise(40, 8)))
    quantizer.thaw()
    quantizer(noise(40, 8)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in quantizer.parameters())


def test_a_model_in_bf16_transforms_in_bf16():
    quantizer = transformed(metric="euclidean").to(torch.bfloat16)
    out = quantizer(noise(40, 8).bfloat16())
    assert quantizer.codebook.dtype == torch.float32 and out.quantized.dtype == torch.bfloat16
    out.loss.backward()
    assert quantizer.transform.weight.grad.abs().max() > 0


def test_under_autocast_the_codes_are_those_of_fp32():
    quantizer = transformed(metric="euclidean").eval()
    with torch.autocast("cpu", torch.bfloat16):
        out, decoded = quantizer(noise(40, 8)), quantizer.decode(quantizer.encode(noise(40, 8)))
    assert torch.equal(out.quantized, decoded) and torch.equal(decoded, quantizer(noise(40, 8)).quantized)


def test_residual_stages_have_transforms_of_their_own():
    stack = ResidualVectorQuantizer(16, 8, 3, transform=nn.Linear(8, 8, bias=False)).train()
    stack(noise(40, 8)).loss.backward()
    gradients = [stage.transform.weight.grad for stage in copy.copy(stack.stages)]
    assert len({stage.transform for stage in stack.stages}) == 3 and all(g.abs().max() > 0 for g in gradients)


def test_options_that_make_no_sense_with_it_are_refused():
    with pytest.raises(ValueError, match="sum_ema"):
        transformed(metric="euclidean", learning="sum_ema")
    with pytest.raises(ValueError, match="stored_dim"):
        FusedVectorQuantizer(16, 8, stored_dim=4)
    with pytest.raises(ValueError, match=r"must return codes \[1, 16, 8\]; it returned \[1, 16, 4\]"):
        FusedVectorQuantizer(16, 8, transform=nn.Linear(8, 4))(noise(3, 8))
