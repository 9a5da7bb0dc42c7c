"""Schedule and parameter groups agree with the reference's."""

from __future__ import annotations

import math

import pytest
import torch

from beitv2_fast.config.presets import PRETRAIN, TOKENIZER
from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.downstream.segmentation.model import Segmenter, SegmenterConfig
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.training.optim import Schedule, adamw, cosine_schedule, parameter_groups

from ..models.test_golden import vit_config
from ..support import weights
from ..support.golden import load
from ..support.small_runs import small_runs
from ..support.training import call, last_weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base", (768, 12, 12, 9, 0.1, 300, (0.9, 0.98), 0.0)),
        ("base_1600", (768, 12, 12, 9, 0.1, 1600, (0.9, 0.999), 0.1)),
        ("large", (1024, 24, 16, 21, 1e-5, 300, (0.9, 0.98), 0.0)),
        ("large_1600", (1024, 24, 16, 21, 1e-5, 1600, (0.9, 0.999), 0.1)),
    ],
)
def test_presets_of_pre_training_are_the_paper_s(name, expected):
    c = PRETRAIN[name]
    assert (c.dim, c.depth, c.heads, c.early_layer, c.layer_scale, c.epochs, c.betas, c.drop_path) == expected
    assert (c.lr, c.lr_batch, c.min_lr, c.warmup_epochs, c.weight_decay) == (1.5e-3, 2048, 1e-5, 10, 0.05)
    assert (c.weight_decay_end, c.clip_grad, c.init_std, c.crop_scale, c.color_jitter) == (None, 3, 0.02, (0.2, 1), 0.4)
    assert (c.mask, c.num_masked, c.min_mask_patches, c.max_mask_patches) == ("block", 75, 16, None)
    assert (c.position, c.aggregation_depth, c.shared_head, c.loss_on) == ("shared_relative", 2, True, "both")


@pytest.mark.parametrize("name", ["base", "base_1_block", "base_1_block_dino", "large"])
def test_presets_of_the_tokenizer_are_the_paper_s(name):
    c = TOKENIZER[name]
    assert (c.epochs, 8 * c.batch_size, c.lr, c.lr_batch, c.min_lr, c.warmup_epochs) == (100, 512, 5e-5, 128, 1e-5, 10)
    assert (c.betas, c.weight_decay, c.clip_grad, c.crop_scale, c.views) == ((0.9, 0.99), 1e-4, 0, (0.08, 1), 0)
    assert (c.num_codes, c.code_dim, c.decay, c.commitment_weight, c.kmeans_init) == (8192, 32, 0.99, 1, True)


def test_the_learning_rate_follows_the_reference_in_every_step(golden):
    args, values = golden["cosine_lr"]["args"], golden["cosine_lr"]["values"]
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


def test_layer_decay_groups_are_the_reference_s(golden):
    golden = golden["layer_decay"]
    _, c = load("classifier")
    model = Classifier(
        ClassifierConfig(vit=vit_config(c, depth=c["depth"], position="relative"), num_classes=c["num_classes"])
    )
    model.no_weight_decay = set  # the reference was called with no names to spare

    def summary(groups):
        return {(g["weight_decay"], round(g["lr_scale"], 12)): sorted(g["names"]) for g in groups}

    groups = parameter_groups(model, 0.05, layer_decay=golden["layer_decay"])
    assert summary(groups) == summary(golden["groups"])


# the last parts of the names of parameters that decay; "weight" of layers with two dimensions or more
DECAYED = {"weight", "mask_token", "relative_position_bias_table"}
SPARED = {"bias", "cls_token", "pos_embed", "gamma_1", "gamma_2", "q_bias", "v_bias"}
MODELS = {
    **{f"student, {p}": (lambda p=p: weights.student(p)) for p in weights.POSITIONS},
    "student without aggregation": lambda: weights.student(aggregation_depth=0),
    "student with separate heads": lambda: weights.student("absolute", shared_head=False, layer_scale=0.0),
    "tokenizer": weights.tokenizer,
    **{f"classifier, {p}": (lambda p=p: weights.classifier(p)) for p in weights.POSITIONS},
    **{
        f"segmenter, {p}": (lambda p=p: Segmenter(SegmenterConfig(weights.vit(p), 5, (0, 1, 1, 2), 8, 8)))
        for p in ("relative", "absolute", "none")
    },
}


def assert_spared(decay: dict[str, float], model) -> None:
    assert decay.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        assert leaf in DECAYED | SPARED
        norm = leaf == "weight" and parameter.dim() == 1
        assert decay[name] == (0.0 if leaf in SPARED or norm else 0.05), name


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_spares_cls_tokens_position_embeddings_and_what_has_one_dimension_in_every_model(
    name, layer_decay
):
    model = MODELS[name]()
    if layer_decay < 1 and name == "tokenizer":
        pytest.skip("its blocks are the encoder's and the decoder's")
    groups = parameter_groups(model, 0.05, layer_decay=layer_decay)
    assert_spared({n: g["weight_decay"] for g in groups for n in g["names"]}, model)


def test_the_weight_decay_goes_along_a_cosine_to_the_final_one_and_spares_what_it_spared():
    config = PretrainConfig(epochs=2, batch_size=4, warmup_epochs=1, weight_decay=0.05, weight_decay_end=0.45)
    schedule = Schedule.of(config, num_images=20, world_size=1)  # 10 steps, 5 of them warm-up
    optimizer = adamw(parameter_groups(weights.student(), config.weight_decay), config)
    found = []
    for step in range(10):
        schedule.set_weight_decay(optimizer, step)
        found.append([group["weight_decay"] for group in optimizer.param_groups])
    decayed = optimizer.param_groups[0]["decayed"]
    spared, values = zip(*(row[:: 1 if not decayed else -1] for row in found), strict=True)
    assert set(spared) == {0.0}
    assert values == pytest.approx([0.25 - 0.2 * math.cos(math.pi * step / 10) for step in range(10)])


def test_the_command_trains_with_the_weight_decay_of_every_step(tmp_path, monkeypatch):
    root, used = small_runs(tmp_path), []
    step = torch.optim.AdamW.step

    def noted(optimizer, *args):
        used.append(max(group["weight_decay"] for group in optimizer.param_groups))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    options = [*ONE_STEP, *STAGES["pretrain"].split(), "--tokenizer", root / "tokenizer", "--data", root / "data"]
    options += ["--epochs", 2, "--weight-decay-end", 0.25]
    assert call("pretrain", "--preset", "demo", *options, "--out", tmp_path / "out") == 0
    assert used == pytest.approx([0.05, 0.15])


STAGES = {
    "tokenizer": "--teacher-image-size 128 --num-codes 16 --code-dim 8 --decoder-depth 1",
    "pretrain": "--position absolute --early-layer 1 --num-masked 6 --min-mask-patches 2",
    "finetune": "--weights none",
}
ONE_STEP = "--batch-size 8 --epochs 1 --warmup-epochs 0 --workers 0".split()
ONE_STEP += "--image-size 32 --patch-size 8 --dim 16 --depth 2 --heads 2".split()


@pytest.mark.parametrize("stage", STAGES)
def test_the_commands_train_with_these_groups(stage, tmp_path):
    """One step with and without weight decay: the gradient is the same, so only what decays differs."""
    root, ends = small_runs(tmp_path), []
    tokenizer = ["--tokenizer", root / "tokenizer"] if stage == "pretrain" else []
    for decay in (0.0, 0.5):
        options = [*ONE_STEP, *STAGES[stage].split(), *tokenizer, "--weight-decay", decay, "--data", root / "data"]
        assert call(stage, "--preset", "demo", *options, "--out", tmp_path / str(decay)) == 0
        ends.append(last_weights(tmp_path / str(decay)))
    changed = {name.rpartition(".")[2] for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])}
    assert "weight" in changed and changed <= DECAYED
