"""Names in every format: round trips, what is recognized, and what is refused."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast import Classifier, ClassifierConfig, ViTConfig
from beitv2_fast.errors import CheckpointError, UserError
from beitv2_fast.models.vit import SIZES, normalize
from beitv2_fast.weights import convert, detect, kind_of
from beitv2_fast.weights.names import FORMATS
from beitv2_fast.weights.shapes import describe
from beitv2_fast.weights.start import start_from

from ..support.golden import load, under
from ..support.weights import POSITIONS, assert_same_state, classifier, student, tokenizer, vit

MODELS = {
    **{f"student, {position}": lambda p=position: student(p) for position in POSITIONS},
    **{f"classifier, {position}": lambda p=position: classifier(p) for position in POSITIONS},
    "student without aggregation": lambda: student(aggregation_depth=0),
    "student with separate heads": lambda: student(shared_head=False),
    "student without layer scale": lambda: student(layer_scale=0.0),
}
GOLDEN = ("classifier", "pretrain_shared_bias", "pretrain_per_block_bias", "pretrain_abs_pos_separate_head")


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_every_entry_has_the_same_bits(model, target):
    state = MODELS[model]().state_dict()
    there = convert(state, target)
    assert_same_state(convert(there, "beitv2_fast", target), state)


@pytest.mark.parametrize("target", ("beitv2_fast", "published"))
def test_a_tokenizer_goes_there_and_back_with_its_counters(target):
    state = tokenizer().state_dict()
    assert_same_state(convert(convert(state, target), "beitv2_fast"), state)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_state_comes_back_whole_from_every_format(name, target):
    published = under(load(name)[0], "param.")
    assert_same_state(convert(convert(published, target), "published"), published)


def test_a_published_tokenizer_comes_back_whole_with_the_statistics_that_nothing_reads():
    published = under(load("vqkd_tiny")[0], "param.")
    assert_same_state(convert(convert(published, "beitv2_fast"), "published"), published)


def test_a_chain_through_all_formats_loses_nothing():
    state = weights = student().state_dict()
    for target in (*FORMATS, *reversed(FORMATS), "beitv2_fast"):
        weights = convert(weights, target)
    assert_same_state(weights, state)


@pytest.mark.parametrize("target", FORMATS)
def test_bf16_weights_stay_bf16(target):
    state = {name: value.bfloat16() for name, value in classifier().state_dict().items()}
    assert_same_state(convert(convert(state, target), "beitv2_fast"), state)


@pytest.mark.parametrize(
    ("target", "seen_as"),
    [
        ("beitv2_fast", "beitv2_fast"),
        ("timm", "beitv2_fast"),  # the same names
        ("published", "published"),
        ("transformers", "transformers"),
        ("transformers_modules", "transformers_modules"),
    ],
)
def test_the_format_is_recognized(target, seen_as):
    assert detect(convert(classifier().state_dict(), target)) == seen_as


@pytest.mark.parametrize(
    ("model", "kind"), [(student, "student"), (classifier, "classifier"), (tokenizer, "tokenizer")]
)
def test_the_kind_is_recognized(model, kind):
    assert kind_of(model().state_dict()) == kind


def test_every_name_that_is_not_understood_is_named():
    state = {**classifier().state_dict(), "blocks.0.mlp.fc3.weight": torch.ones(1), "color": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"named blocks\.0\.mlp\.fc3\.weight, color"):
        convert(state, "timm")


def test_a_missing_piece_of_a_joined_tensor_is_named():
    state = convert(classifier().state_dict(), "transformers")
    name = "beit.encoder.layer.1.attention.attention.key.weight"
    del state[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        convert(state, "beitv2_fast")


def test_weights_of_another_model_are_no_format():
    with pytest.raises(CheckpointError, match="no weights of a BEiT v2 model"):
        convert({"conv1.weight": torch.ones(1)}, "timm")


def test_entries_that_are_no_tensors_are_named():
    with pytest.raises(CheckpointError, match="these entries are none: epoch, args"):
        convert({**classifier().state_dict(), "epoch": 3, "args": None}, "timm")


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no format 'keras'.*beitv2_fast, published"):
        convert(classifier().state_dict(), "keras")


@pytest.mark.parametrize("target", ("timm", "transformers"))
def test_a_tokenizer_has_no_counterpart_outside(target):
    with pytest.raises(CheckpointError, match=f"{target} has no tokenizer"):
        convert(tokenizer().state_dict(), target)


def test_a_classifier_that_reads_the_cls_token_is_refused():
    state = {name.replace("fc_norm", "norm"): value for name, value in classifier().state_dict().items()}
    with pytest.raises(CheckpointError, match="reads the CLS token"):
        convert(state, "beitv2_fast", "timm")


def test_an_index_of_another_grid_is_refused():
    state = convert(classifier().state_dict(), "published")
    name = "blocks.1.attn.relative_position_index"
    state[name] = state[name].flip(0)
    with pytest.raises(CheckpointError, match="only models of square images"):
        convert(state, "beitv2_fast")


def test_keys_with_a_bias_of_zeros_are_read_and_others_refused():
    state = classifier().state_dict()
    theirs = convert(state, "transformers")
    name = "beit.encoder.layer.0.attention.attention.key.bias"
    assert_same_state(convert({**theirs, name: torch.zeros(32)}, "beitv2_fast"), state)
    with pytest.raises(CheckpointError, match=name):
        convert({**theirs, name: torch.ones(32)}, "beitv2_fast")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("model", (student, classifier))
def test_the_config_is_read_off_the_weights(model, position):
    config = model(position).config
    known = {"heads": 4, "image_size": 48, "early_layer": 2}  # what no shape tells
    assert describe(model(position).state_dict(), known) == config


def test_a_tokenizers_config_is_read_off_its_weights():
    model = tokenizer()
    assert describe(model.state_dict(), {"heads": 4}) == model.config


def test_heads_that_no_shape_tells_are_asked_for():
    with pytest.raises(CheckpointError, match="number of attention heads"):
        describe(tokenizer().state_dict())


def test_fine_tuning_starts_with_the_backbones_features():
    model, start = student(), Classifier(ClassifierConfig(vit("relative"), 5))
    new = start_from(start, model.state_dict(), "FILE")
    assert new == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(start.eval().forward_tokens(x), model.forward_tokens(x), rtol=1e-5, atol=1e-5)


def test_the_tokenizers_encoder_keeps_its_norm_and_sees_the_same_in_normalized_images():
    model, start = tokenizer(), Classifier(ClassifierConfig(vit("absolute", 0.0), 5))
    assert start_from(start, model.state_dict(), "FILE") == ["head.weight", "head.bias"]
    x = torch.rand(2, 3, 48, 48)
    tokens = start.eval().forward_tokens(normalize(x))
    torch.testing.assert_close(tokens, model.encoder.forward_tokens(2 * x - 1), rtol=1e-4, atol=1e-4)


def test_a_classifier_with_one_table_for_all_layers_starts_one_with_a_table_in_every_layer():
    model, start = classifier("shared_relative"), Classifier(ClassifierConfig(vit("relative"), 7))
    assert start_from(start, model.state_dict(), "FILE") == []
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(start.eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_head_for_other_classes_is_new_and_the_rest_loaded():
    model, start = classifier(num_classes=7), Classifier(ClassifierConfig(vit("relative"), 5))
    assert start_from(start, model.state_dict(), "FILE") == ["head.weight", "head.bias"]
    assert torch.equal(start.fc_norm.weight, model.fc_norm.weight)


def test_heads_that_no_shape_tells_are_those_of_the_sizes():
    for size in SIZES.values():
        config = ViTConfig(**{**size, "depth": 1}, image_size=2 * size["patch_size"], position="absolute")
        with torch.device("meta"):
            state = Classifier(ClassifierConfig(config, 3)).state_dict()
        assert describe(state).vit.heads == size["heads"]
