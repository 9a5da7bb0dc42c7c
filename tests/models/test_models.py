"""The models that can be chosen: sizes, positions, objectives, precision, checkpointing, compilation, export."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast.config.presets import PRETRAIN
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import SIZES, ViTConfig

from ..support.counting import allocations

TINY = ViTConfig(image_size=32, patch_size=8, dim=24, depth=3, heads=2, layer_scale=0.1, init_std=0.2)
POSITIONS = ("shared_relative", "relative", "absolute")


def student(seed: int = 0, **options) -> Student:
    torch.manual_seed(seed)
    names = {f.name for f in dataclasses.fields(ViTConfig)}
    vit = dataclasses.replace(TINY, **{name: v for name, v in options.items() if name in names})
    rest = {name: v for name, v in options.items() if name not in names}
    return Student(StudentConfig(vit, **{"num_codes": 16, "early_layer": 2, **rest})).train()


def tokenizer(**options) -> Tokenizer:
    torch.manual_seed(0)
    vit = dataclasses.replace(TINY, position="absolute", layer_scale=0.0, **options)
    return Tokenizer(TokenizerModelConfig(vit, decoder_depth=1, num_codes=16, code_dim=8, teacher_dim=4)).train()


def masked_batch(count: int = 4) -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(count, 16, dtype=torch.bool)
    mask[:, :6] = True
    labels = torch.randint(0, 16, (6 * count,), generator=generator)
    return torch.rand(count, 3, 32, 32, generator=generator), mask, labels, 6


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("size", "millions"), [("small", 21.7), ("base", 85.8), ("large", 303.3), ("huge", 630.8)])
def test_the_named_sizes_are_the_papers_vits(size, millions):
    with torch.device("meta"):
        model = Classifier(ClassifierConfig(ViTConfig(**SIZES[size], position="absolute"), num_classes=1))
    # without the classifier's linear layer; the published counts have a bias on the keys, too
    keys = SIZES[size]["depth"] * SIZES[size]["dim"]
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head"))
    assert (parameters + keys) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("preset", PRETRAIN)
def test_every_preset_builds_a_student_whose_mask_fits(preset):
    from beitv2_fast.weights.build import build_student

    with torch.device("meta"):
        model = build_student(PRETRAIN[preset], 8192)
    assert model.vit_config.position == ("absolute_" if preset == "demo" else "") + "shared_relative"
    assert PRETRAIN[preset].num_masked < model.vit_config.num_patches


@pytest.mark.parametrize("decoder_depth", [1, 3])
@pytest.mark.parametrize(("num_codes", "code_dim"), [(16, 8), (40, 5)])
def test_a_tokenizer_has_any_codebook_and_decoder(decoder_depth, num_codes, code_dim):
    config = TokenizerModelConfig(
        dataclasses.replace(TINY, position="absolute"), decoder_depth, num_codes, code_dim, teacher_dim=7
    )
    model = Tokenizer(config).train()
    out = model(torch.rand(4, 3, 32, 32), torch.randn(4, 16, 7))
    out.loss.backward()
    assert len(model.decoder.blocks) == decoder_depth and out.indices.max() < num_codes
    assert model.quantize.codebook.shape == (num_codes, code_dim)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("heads", ["none", "shared", "separate"])
def test_every_objective_with_every_position_gives_all_parameters_a_gradient(position, heads):
    depth = 0 if heads == "none" else 2
    model = student(position=position, aggregation_depth=depth, shared_head=heads != "separate")
    out = model(*masked_batch())
    grads = gradients(model, out.loss)
    assert out.losses.shape == ((1,) if depth == 0 else (2,))
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in grads.values())


def test_without_patch_aggregation_the_loss_is_beit_v1s():
    model = student(aggregation_depth=0)
    images, mask, labels, count = masked_batch()
    logits = model.lm_head(model.norm(model.encode(images, mask)[0][:, 1:]))[mask]
    torch.testing.assert_close(model(images, mask, labels, count).loss, F.cross_entropy(logits, labels))


def test_the_shared_bias_is_computed_once_per_forward():
    model, calls = student(), []
    model.rel_pos_bias.register_forward_hook(lambda *_: calls.append(1))
    model(*masked_batch())
    assert calls == [1]


@pytest.mark.parametrize("position", POSITIONS)
def test_bf16_autocast_stays_near_fp32(position):
    model, batch = student(position=position), masked_batch()
    exact = gradients(model, model(*batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch).loss
    near = gradients(model, loss)
    assert loss.dtype == torch.float32
    for name, gradient in exact.items():
        error = (near[name] - gradient).norm() / gradient.norm()
        assert error < 0.1, name  # bf16 rounds each factor to 2^-9; three blocks of sums over 24 to 96 of them


@pytest.mark.parametrize("position", POSITIONS)
def test_checkpointing_gives_the_same_bits_with_drop_path(position):
    batch, results = masked_batch(8), []
    for checkpointing in (False, True):
        model = student(position=position, checkpointing=checkpointing, drop_path=0.4)
        torch.manual_seed(7)
        results.append(gradients(model, model(*batch).loss))
    assert all(torch.equal(results[0][name], gradient) for name, gradient in results[1].items())


def test_checkpointing_gives_the_same_bits_in_a_tokenizer():
    results = []
    for checkpointing in (False, True):
        model = tokenizer(checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(3)
        images = torch.rand(8, 3, 32, 32, generator=generator)
        out = model(images, torch.randn(8, 16, 4, generator=generator))
        results.append({**gradients(model, out.loss), "codebook": model.quantize.codebook.clone()})
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_checkpointing_keeps_less_memory():
    batch = masked_batch(64)
    models = [student(checkpointing=checkpointing, depth=8) for checkpointing in (False, True)]
    everything, checkpointed = (allocations(lambda m=m: m(*batch).loss.backward())[0] for m in models)
    assert checkpointed < 0.5 * everything


def test_a_students_training_step_with_checkpointing_compiles_without_a_graph_break():
    model, batch = student(checkpointing=True), masked_batch()
    eager = gradients(model, model(*batch).loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = gradients(model, compiled(*batch).loss)
    for name, gradient in eager.items():
        torch.testing.assert_close(result[name], gradient)


def test_a_student_compiles_where_the_number_of_masked_patches_differs_between_images(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = student(depth=1, early_layer=1, aggregation_depth=1)  # inductor takes seconds for each block
    images, mask, labels, _ = masked_batch()
    mask = mask.clone()
    mask[0, :4] = False
    compiled = torch.compile(model, fullgraph=True)
    result = gradients(model, compiled(images, mask, labels[4:]).loss)
    for name, gradient in gradients(model, model(images, mask, labels[4:]).loss).items():
        torch.testing.assert_close(result[name], gradient)


def test_a_tokenizers_training_step_compiles_without_a_graph_break():
    generator = torch.Generator().manual_seed(3)
    images, target = torch.rand(8, 3, 32, 32, generator=generator), torch.randn(8, 16, 4, generator=generator)
    models = [tokenizer(), tokenizer()]
    for model in models:
        model(images, target)  # k-means starts the codebook
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    eager = gradients(models[0], models[0](images, target).loss)
    result = gradients(models[1], compiled(images, target).loss)
    for name, gradient in eager.items():
        torch.testing.assert_close(result[name], gradient)
    torch.testing.assert_close(models[1].quantize.codebook, models[0].quantize.codebook)


class Features(nn.Module):
    def __init__(self, model: Student):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode(images)[1]


@pytest.mark.parametrize("kind", ["student", "classifier"])
def test_students_and_classifiers_export_and_give_the_same_features_for_any_batch(kind):
    model = Features(student()) if kind == "student" else Classifier(ClassifierConfig(TINY, num_classes=5))
    images, shapes = torch.rand(5, 3, 32, 32), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model.eval(), (images[:3],), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(images), model(images))
