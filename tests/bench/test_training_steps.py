"""The step that bench/ measures ours against computes the same: gradients, and losses and codebook over steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from beitv2_fast.config.presets import PRETRAIN, TOKENIZER
from bench import profile_step
from bench.harness import OURS
from bench.training_steps import REFERENCE, STAGES, Step, steps

VIT = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 3, "heads": 2, "init_std": 0.1}
CONFIGS = {
    "VQ-KD": replace(TOKENIZER["base"], **VIT, decoder_depth=1, num_codes=8192, code_dim=8),
    "pre-training": replace(PRETRAIN["base"], **VIT, early_layer=2, num_masked=6),
}


def both(stage: str, dtype: torch.dtype | None = None) -> tuple[Step, Step]:
    found = steps(stage, 4, dtype, CONFIGS[stage])
    return found[OURS], found[REFERENCE]


@pytest.mark.parametrize("stage", STAGES)
def test_both_structures_have_the_same_gradients(stage):
    ours, theirs = both(stage)
    for step in (ours, theirs):
        step.forward().backward()
    gradients = {name: p.grad for name, p in ours.model.named_parameters()}
    assert len(gradients) == len(list(theirs.model.parameters()))
    for name, parameter in theirs.model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, name


@pytest.mark.parametrize("stage", STAGES)
def test_both_structures_have_the_same_losses_over_steps(stage):
    ours, theirs = both(stage)
    losses = [(ours(), theirs()) for _ in range(4)]
    for one, other in losses:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
    assert losses[-1][0] < losses[0][0]
    if stage == "VQ-KD":
        torch.testing.assert_close(ours.model.quantize.codebook, theirs.model.quantize.codebook, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_under_bf16_autocast_their_losses_agree(stage):
    ours, theirs = both(stage, torch.bfloat16)
    torch.testing.assert_close(ours.forward(), theirs.forward(), rtol=1e-2, atol=0)


def test_a_tokenizer_in_the_step_gives_both_structures_the_same_labels():
    found = steps("pre-training", 4, None, CONFIGS["pre-training"], CONFIGS["VQ-KD"])
    given = steps("pre-training", 4, None, CONFIGS["pre-training"])
    ours, theirs = (found[name].forward() for name in (OURS, REFERENCE))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert ours != given[OURS].forward()  # whose labels are drawn


@pytest.mark.parametrize(("stage", "special"), [("VQ-KD", "quantizer"), ("pre-training", "head")])
def test_a_profile_finds_every_part_of_both(stage, special):
    for step in both(stage):
        found = profile_step.seconds_by_part(step, stage)
        wanted = {"linear layers", "attention", "norms, GELU", "patch embedding", "optimizer", special}
        assert wanted <= {part for part, seconds in found.items() if seconds > 0}
