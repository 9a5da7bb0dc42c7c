"""Quantizer, tokenizer, students and classifier agree with the reference implementation's tensors: the small files of
tests/golden, and all of ../shared/golden where that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.quantize.quantizer import FusedVectorQuantizer

from ..support.golden import (
    LARGE,
    SMALL,
    STRIDE,
    assert_close,
    assert_gradients_close,
    load,
    load_parameters,
    needs_large,
)


@pytest.fixture(params=["small", pytest.param("large", marks=needs_large)])
def folder(request) -> Path:
    return SMALL if request.param == "small" else LARGE


@needs_large
@pytest.mark.parametrize("name", sorted(file.stem for file in SMALL.glob("*.safetensors")))
def test_the_small_files_hold_and_draw_the_bits_of_the_large_ones(name):
    large, config = load(name, LARGE)
    small, same_config = load(name)
    assert same_config == config
    assert large.keys() - small.keys() <= {"out.preprocessed", "out.z_q"}
    for key, value in small.items():
        whole = value.shape == large[key].shape
        assert torch.equal(value, large[key] if whole else large[key].flatten()[::STRIDE]), key


def test_the_small_files_are_small():
    assert sum(file.stat().st_size for file in SMALL.iterdir()) < 1e6


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (SMALL, "quantizer_small"),
        *(pytest.param(LARGE, name, marks=needs_large) for name in ("quantizer_small", "quantizer_default_dim")),
    ],
)
def test_quantizer_follows_the_reference_over_five_steps_and_in_eval(folder, name):
    golden, _ = load(name, folder)
    num_codes, dim = golden["init.codebook"].shape
    quantizer = FusedVectorQuantizer(
        num_codes,
        dim,
        decay=golden["decay"].item(),
        commitment_weight=golden["beta"].item(),
        kmeans_init=False,
        dead_after=0,
    )
    quantizer.codebook.copy_(golden["init.codebook"])
    for step in [*(f"step{i}" for i in range(5)), "eval"]:
        quantizer.train(step != "eval")
        z = golden[f"{step}.z"].requires_grad_(step != "eval")
        out = quantizer(z.movedim(1, -1))
        assert torch.equal(out.indices.flatten(), golden[f"{step}.indices"])
        assert_close(out.quantized.movedim(-1, 1), golden[f"{step}.z_q"])
        assert_close(out.loss, golden[f"{step}.loss"])
        assert_close(quantizer.cluster_size, golden[f"{step}.cluster_size"])
        if step != "eval":
            upstream = golden[f"{step}.upstream_grad"].movedim(1, -1)
            (out.loss + (out.quantized * upstream).sum()).backward()
            assert_close(z.grad, golden[f"{step}.grad_z"])
            assert_close(quantizer.codebook, golden[f"{step}.codebook"])


def vit_config(c: dict, **overrides) -> ViTConfig:
    values = dict(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        dim=c["embed_dim"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        eps=c["ln_eps"],
        layer_scale=c.get("init_values", 0.0),
    )
    return ViTConfig(**{**values, **overrides})


def test_tokenizer_agrees_in_forward_losses_gradients_and_codebook(folder):
    golden, c = load("vqkd_tiny", folder)
    model = Tokenizer(
        TokenizerModelConfig(
            encoder=vit_config(c, depth=c["encoder_depth"], position="absolute"),
            decoder_depth=c["decoder_depth"],
            num_codes=c["n_code"],
            code_dim=c["code_dim"],
            teacher_dim=c["teacher_dim"],
            decay=c["decay"],
            commitment_weight=c["beta"],
        )
    )
    load_parameters(model, golden)
    model.train()
    out = model(golden["in.image01"], golden["in.teacher"])
    out.loss.backward()
    assert torch.equal(out.indices.flatten(), golden["out.indices"])
    assert_close(out.reconstruction, golden["out.rec"])
    assert_close(out.rec_loss, golden["out.rec_loss"])
    assert_close(out.commit_loss, golden["out.quant_loss"])
    assert_close(model.quantize.codebook, golden["out.codebook_after"])
    assert_gradients_close(model, golden)
    assert torch.equal(model.eval().encode(golden["in.image01"]), golden["out.eval_tokens"])


@pytest.mark.parametrize("variant", ["shared_bias", "abs_pos_separate_head", "per_block_bias"])
def test_student_agrees_in_logits_losses_and_gradients(folder, variant):
    golden, c = load(f"pretrain_{variant}", folder)
    position = "absolute" if c["use_abs_pos_emb"] else "shared_relative" if c["use_shared_rel_pos_bias"] else "relative"
    config = StudentConfig(
        vit=vit_config(c, depth=c["depth"], position=position),
        num_codes=c["vocab_size"],
        early_layer=c["early_layers"],
        aggregation_depth=c["head_layers"],
        shared_head=c["shared_lm_head"],
    )
    model = Student(config)
    load_parameters(model, golden)
    mask = golden["in.mask"]
    for logits, name in zip(model.predict(golden["in.image"], mask), ("mim", "cls"), strict=True):
        assert_close(logits[mask], golden[f"out.logits_{name}"])
    out = model(golden["in.image"], mask, golden["in.labels"], num_masked=int(mask[0].sum()))
    assert_close(out.losses, torch.cat([golden["out.loss_mim"], golden["out.loss_cls"]]))
    out.loss.backward()
    assert_gradients_close(model, golden)


def test_classifier_agrees_in_logits_loss_and_gradients(folder):
    golden, c = load("classifier", folder)
    model = Classifier(
        ClassifierConfig(vit=vit_config(c, depth=c["depth"], position="relative"), num_classes=c["num_classes"])
    )
    load_parameters(model, golden)
    logits = model(golden["in.image"])
    loss = F.cross_entropy(logits, golden["in.label"])
    assert_close(logits, golden["out.logits"])
    assert_close(loss, golden["out.loss"])
    loss.backward()
    assert_gradients_close(model, golden)
