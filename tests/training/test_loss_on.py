"""Which branches of the student a pre-training learns from (--loss-on, an ablation)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.errors import UserError
from beitv2_fast.train.pretrain import PretrainTask
from beitv2_fast.weights.build import build_student

CONFIG = PretrainConfig(
    image_size=32, patch_size=8, dim=24, depth=2, heads=2, early_layer=1, num_masked=6, min_mask_patches=2
)


class Codes:
    """A tokenizer whose codes are the patches' numbers, modulo 8."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (torch.arange(16) % 8).expand(len(images), -1)


def step(loss_on: str) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """The loss of a step, its gradients by name, and what the log says."""
    config = dataclasses.replace(CONFIG, loss_on=loss_on)
    torch.manual_seed(0)
    model = build_student(config, 8)
    task = PretrainTask(model, Codes(), config)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 4:10] = True
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loss, said = task.loss(model, {"student": images, "tokenizer": images, "mask": mask})
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, {k: v.item() for k, v in said.items()}


def test_the_loss_is_that_of_the_branches_which_are_named():
    both, _, said = step("both")
    assert both == pytest.approx(said["loss_mim"] + said["loss_agg"], rel=1e-6)
    assert step("last")[0] == pytest.approx(said["loss_mim"], rel=1e-6)
    assert step("aggregation")[0] == pytest.approx(said["loss_agg"], rel=1e-6)
    assert step("last")[2] == said  # the log tells both, whatever is learned from


def test_the_other_branch_s_own_blocks_get_a_gradient_of_zero():
    _, last, _ = step("last")
    _, both, _ = step("both")
    own = [name for name in both if name.startswith("cls_pt_layers")]
    assert own and all(both[name].abs().sum() > 0 for name in own if name.endswith("weight"))
    assert all(last[name] is not None and last[name].abs().sum() == 0 for name in own)


def test_the_aggregation_alone_needs_such_a_branch():
    config = dataclasses.replace(CONFIG, loss_on="aggregation", aggregation_depth=0)
    with pytest.raises(UserError, match="give an --aggregation-depth above 0"):
        PretrainTask(build_student(config, 8), Codes(), config)
