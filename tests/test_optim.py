"""Schedule and parameter groups agree with the reference's."""

from __future__ import annotations

import json

import pytest

from beitv2_fast.classifier import Classifier, ClassifierConfig
from beitv2_fast.optim import cosine_schedule, parameter_groups

from .golden import FOLDER, load, needs_golden
from .test_golden import vit_config


@needs_golden
def test_the_learning_rate_follows_the_reference_in_every_step():
    golden = json.loads((FOLDER / "masks_and_schedules.json").read_text())["cosine_lr"]
    args, values = golden["args"], golden["values"]
    ours = [
        cosine_schedule(
            step,
            peak=args["base"],
            final=args["final"],
            total_steps=args["epochs"] * args["steps_per_epoch"],
            warmup_steps=args["warmup_epochs"] * args["steps_per_epoch"],
            start=args["start"],
        )
        for step in range(len(values))
    ]
    assert ours == pytest.approx(values, rel=1e-12)


@needs_golden
def test_layer_decay_groups_are_the_reference_s():
    golden = json.loads((FOLDER / "masks_and_schedules.json").read_text())["layer_decay"]
    _, c = load("classifier")
    model = Classifier(
        ClassifierConfig(vit=vit_config(c, depth=c["depth"], position="relative"), num_classes=c["num_classes"])
    )

    def summary(groups):
        return {(g["weight_decay"], round(g["lr_scale"], 12)): sorted(g["names"]) for g in groups}

    groups = parameter_groups(model, 0.05, layer_decay=golden["layer_decay"])
    assert summary(groups) == summary(golden["groups"])
