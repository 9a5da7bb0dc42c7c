"""Initial weights, drop path and positions are the reference's: values, not only shapes."""

from __future__ import annotations

import math

import pytest
import torch

from beitv2_fast import (
    Classifier,
    ClassifierConfig,
    Student,
    StudentConfig,
    Tokenizer,
    TokenizerModelConfig,
    ViTConfig,
)
from beitv2_fast.downstream.segmentation.model import Segmenter, SegmenterConfig

STD = 0.02
CUT_AT_ONE_STD = 0.5396 * STD  # the deviation of a normal distribution between -1 and 1 standard deviation
DIM, PATCH, CODE_DIM = 128, 16, 32
SHAPE = {"image_size": 64, "patch_size": PATCH, "dim": DIM, "depth": 4, "heads": 2}


def uniform(fan_in: int) -> float:
    """The deviation of torch's own initial weights."""
    return 1 / math.sqrt(3 * fan_in)


def deviation(parameter: torch.Tensor, expected: float) -> None:
    """Mean 0 and this deviation, both within 5 standard errors (a normal distribution's, the widest here)."""
    values, error = parameter.detach().double(), expected / math.sqrt(parameter.numel())
    assert abs(values.mean()) < 5 * error and abs(values.std() - expected) < 5 * error / math.sqrt(2)


def rescaled(block: torch.nn.Module, layer: int, std: float | None) -> None:
    """The linear weights of block ``layer`` (from 1); None: torch's own. Biases follow; q_bias and v_bias are zero."""
    for linear, scale in (
        (block.attn.qkv, 1.0),
        (block.attn.proj, math.sqrt(2 * layer)),
        (block.mlp.fc1, 1.0),
        (block.mlp.fc2, math.sqrt(2 * layer)),
    ):
        deviation(linear.weight, (uniform(linear.in_features) if std is None else std) / scale)
        if linear.bias is not None and std is None:
            deviation(linear.bias, uniform(linear.in_features))
        elif linear.bias is not None:
            assert not linear.bias.any()
    assert not block.attn.q_bias.any() and not block.attn.v_bias.any()
    assert (block.norm1.weight == 1).all() and not block.norm1.bias.any()


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def student() -> Student:
    vit = ViTConfig(**SHAPE, position="absolute_shared_relative", layer_scale=0.1)
    return Student(StudentConfig(vit, num_codes=512, early_layer=3, shared_head=False))


def test_a_student_begins_with_a_normal_distribution_cut_at_one_deviation(student):
    for parameter in (student.patch_embed.proj.weight, student.lm_head.weight, student.cls_pt_lm_head.weight):
        deviation(parameter, CUT_AT_ONE_STD)
        assert parameter.abs().max() <= STD
    for parameter in (student.cls_token, student.mask_token, student.pos_embed):
        deviation(parameter, CUT_AT_ONE_STD)
    for layer, block in enumerate(student.blocks, start=1):
        rescaled(block, layer, CUT_AT_ONE_STD)
        assert (block.gamma_1 == 0.1).all()
    for bias in (student.patch_embed.proj.bias, student.lm_head.bias, student.cls_pt_lm_head.bias):
        assert not bias.any()
    assert not student.rel_pos_bias.relative_position_bias_table.any()


def test_the_aggregation_blocks_begin_with_torch_s_own_values_and_later_layers_scale(student):
    for layer, block in enumerate(student.cls_pt_layers, start=4):
        rescaled(block, layer, None)


@pytest.mark.parametrize("model", ["encoder", "decoder", "classifier", "segmenter"])
def test_the_other_models_begin_with_a_whole_normal_distribution_and_torch_s_own_patch_embedding(model):
    absolute = ViTConfig(**SHAPE, position="absolute")
    if model == "classifier":
        vit = Classifier(ClassifierConfig(absolute, num_classes=512))
        deviation(vit.head.weight, STD)
        assert not vit.head.bias.any()
    elif model == "segmenter":
        vit = Segmenter(SegmenterConfig(absolute, 5, (0, 1, 2, 3), 8, 8))
    else:
        tokenizer = Tokenizer(TokenizerModelConfig(absolute, code_dim=CODE_DIM))
        vit = getattr(tokenizer, model)
        for layer in (0, 2):
            deviation(tokenizer.encode_task_layer[layer].weight, STD)
            deviation(tokenizer.decode_task_layer[layer].weight, STD)
    fan_in = CODE_DIM if model == "decoder" else 3 * PATCH**2  # 0.102 at D = 32, the reference's
    deviation(vit.patch_embed.proj.weight, uniform(fan_in))
    deviation(vit.patch_embed.proj.bias, uniform(fan_in))
    deviation(vit.cls_token, STD)
    deviation(vit.pos_embed, STD)
    for layer, block in enumerate(vit.blocks, start=1):
        rescaled(block, layer, STD)


@pytest.mark.parametrize(
    ("depth", "early", "count", "expected"),
    [(12, 9, 2, [0.9 / 11, 1.0 / 11]), (24, 21, 2, [2.1 / 23, 2.2 / 23]), (4, 4, 2, [0.08, 0.1]), (12, 9, 0, [])],
)
def test_the_aggregation_blocks_are_dropped_as_the_blocks_after_the_layer_they_read(depth, early, count, expected):
    vit = ViTConfig(image_size=32, patch_size=16, dim=8, depth=depth, heads=2, drop_path=0.1)
    model = Student(StudentConfig(vit, num_codes=4, early_layer=early, aggregation_depth=count))
    assert [block.drop_path for block in getattr(model, "cls_pt_layers", [])] == pytest.approx(expected)
    assert [model.blocks[0].drop_path, model.blocks[-1].drop_path] == pytest.approx([0.0, 0.1])


def test_absolute_and_relative_positions_add_up():
    """Either alone changes the tokens, and with the table at zero only the embeddings do."""
    vit = ViTConfig(**SHAPE, position="absolute_shared_relative")
    torch.manual_seed(0)
    model = Student(StudentConfig(vit, num_codes=8, early_layer=3)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        embedded = model.encode(images)[0]
        model.rel_pos_bias.relative_position_bias_table.normal_()
        both = model.encode(images)[0]
        model.pos_embed.zero_()
        tables = model.encode(images)[0]
    assert not torch.allclose(embedded, both) and not torch.allclose(both, tables)
