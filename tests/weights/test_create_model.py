"""Models by name and from checkpoints of every format; what does not fit is said entry by entry."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch

from beitv2_fast import Classifier, Student, Tokenizer, create_model, list_models
from beitv2_fast.errors import CheckpointError, UserError
from beitv2_fast.runs.checkpoints import compact, load_model, read_weights
from beitv2_fast.weights import convert
from beitv2_fast.weights import create as models
from beitv2_fast.weights.files import read, write
from beitv2_fast.weights.names import FORMATS

from ..support.weights import assert_same_state, classifier, images, student, tokenizer

TINY = dict(image_size=48, dim=32, depth=3, heads=4)


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch):
    """Names for the tiny models of these tests."""
    for name, model in (("tiny", student()), ("tiny_tokenizer", tokenizer()), ("tiny_classifier", classifier())):
        monkeypatch.setitem(models.MODELS, name, model.config)


@pytest.mark.parametrize("name", ["beitv2_small", "beitv2_base_classifier", "vqkd_base_clip", "vqkd_base_dino"])
def test_a_name_gives_a_model_in_eval_mode(name):
    kind = Tokenizer if name.startswith("vqkd") else Classifier if name.endswith("classifier") else Student
    model = create_model(name, **TINY, **({"early_layer": 2} if kind is Student else {}))
    assert isinstance(model, kind) and not model.training


def test_all_names_have_their_published_shapes():
    shapes = {name: models.flatten(models.model_config(name)) for name in list_models() if not name.startswith("tiny")}
    assert {(s["dim"], s["depth"], s["heads"], s["patch_size"]) for s in shapes.values()} == {
        (384, 12, 6, 16), (768, 12, 12, 16), (1024, 24, 16, 16), (1280, 32, 16, 14)
    }  # fmt: skip
    assert (shapes["beitv2_base"]["early_layer"], shapes["beitv2_large"]["early_layer"]) == (9, 21)
    decoders = {name: s["decoder_depth"] for name, s in shapes.items() if name.startswith("vqkd")}
    assert decoders == {"vqkd_base_clip": 3, "vqkd_base_clip_1": 1, "vqkd_base_dino": 1, "vqkd_base_dino_3": 3}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("beit_tiny", {}, r"no model 'beit_tiny'.*beitv2_base"),
        ("beitv2_base", {"color": 3}, r"a student has no color.*image_size"),
        ("beitv2_base", {"image_size": 225}, "not a multiple"),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_known_ones(name, options, said):
    with pytest.raises(UserError, match=said):
        create_model(name, **options)


@pytest.mark.parametrize("suffix", (".safetensors", ".pth"))
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(("name", "make"), [("tiny", student), ("tiny_classifier", classifier)])
def test_a_checkpoint_of_every_format_gives_the_same_model(tmp_path, name, make, target, suffix):
    model, file = make(), tmp_path / f"weights{suffix}"
    write(file, convert(model.state_dict(), target), target, model.config)
    again = create_model(name, checkpoint=file)
    assert again.config == model.config
    assert_same_state(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("target", ("beitv2_fast", "published"))
def test_a_tokenizers_checkpoint_gives_the_same_codes(tmp_path, target):
    model, file = tokenizer(), tmp_path / "weights.safetensors"
    write(file, convert(model.state_dict(), target), target, model.config)
    again = create_model("tiny_tokenizer", checkpoint=file)
    x = images().sigmoid()
    assert torch.equal(again.encode(x), model.encode(x))


@pytest.mark.parametrize("make", (student, classifier, tokenizer))
def test_our_own_files_need_no_name(tmp_path, make):
    model, file = make(), tmp_path / "weights.safetensors"
    write(file, convert(model.state_dict(), "beitv2_fast"), "beitv2_fast", model.config)
    again = create_model(checkpoint=file)
    assert again.config == model.config
    assert_same_state(again.state_dict(), model.state_dict())


def test_a_file_of_transformers_without_its_extras_lacks_the_aggregation_branch(tmp_path):
    model, file = student(), tmp_path / "weights.safetensors"
    write(file, convert(model.state_dict(), "transformers"), "transformers", model.config)
    (tmp_path / "weights.extras.safetensors").unlink()
    again = create_model("tiny", checkpoint=file)
    assert again.config.aggregation_depth == 0
    assert torch.equal(again.encode(images())[0], model.encode(images())[0])


@pytest.mark.parametrize(
    ("name", "make", "options", "said"),
    [
        ("beitv2_base", student, {}, r"holds no beitv2_base: it has dim 32, not 768; depth 3, not 12"),
        ("tiny", classifier, {}, "the weights of a classifier, but a student was asked for"),
        ("tiny", student, {"num_codes": 99}, "num_codes 20, not 99"),
    ],
)
def test_a_name_or_option_that_the_weights_have_otherwise_is_refused(tmp_path, name, make, options, said):
    file = tmp_path / "weights.pth"
    torch.save(make().state_dict(), file)
    with pytest.raises(CheckpointError, match=said):
        create_model(name, checkpoint=file, **options)


def test_a_classifier_starts_from_a_student_and_says_what_is_new(tmp_path, caplog):
    model, file = student(), tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    with caplog.at_level(logging.WARNING):
        start = create_model("tiny_classifier", checkpoint=file, num_classes=5)
    assert start.config.num_classes == 5 and start.config.vit.position == "relative"
    torch.testing.assert_close(start.forward_tokens(images()), model.forward_tokens(images()), rtol=1e-5, atol=1e-5)
    assert "as initialized: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in caplog.text


def test_a_classifier_with_other_classes_gets_a_new_head_and_says_so(tmp_path, caplog):
    model, file = classifier(), tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    with caplog.at_level(logging.WARNING):
        start = create_model("tiny_classifier", checkpoint=file, num_classes=5)
    assert start(images()).shape == (3, 5) and torch.equal(start.fc_norm.weight, model.fc_norm.weight)
    assert "as initialized: head.weight, head.bias" in caplog.text


def test_every_missing_unexpected_and_reshaped_entry_is_named():
    model = classifier()
    state = {n: v for n, v in model.state_dict().items() if "mlp.fc1" not in n}
    state["fc_norm.weight"] = torch.ones(5)
    state |= {f"extra.{i}.weight": torch.ones(1) for i in range(20)}
    with pytest.raises(CheckpointError) as error:
        load_model(model, state, "FILE")
    assert str(error.value) == (
        "FILE does not fit this Classifier. missing: blocks.0-2.mlp.fc1.weight, blocks.0-2.mlp.fc1.bias; "
        "unexpected: extra.0-19.weight; of another shape: fc_norm.weight ([5] in the file, [32] in the model)"
    )


def test_numbers_of_blocks_are_written_as_ranges():
    assert compact(["blocks.0.a", "blocks.1.a", "blocks.3.a", "norm.b"]) == ["blocks.0-1,3.a", "norm.b"]


def test_a_missing_entry_of_a_checkpoint_is_named(tmp_path):
    state = student().state_dict()
    del state["blocks.1.norm1.weight"], state["mask_token"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth.*missing: mask_token, blocks\.1\.norm1\.weight"):
        create_model("tiny", checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize("make", (student, classifier))
def test_another_image_size_resizes_the_bias_tables(tmp_path, make):
    model, file = make(), tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    large = create_model("tiny" if make is student else "tiny_classifier", checkpoint=file, image_size=80)
    loaded, stored = large.state_dict(), model.state_dict()
    for name, value in stored.items():
        assert "relative_position_bias_table" in name or torch.equal(loaded[name], value)
    tables = [name for name in stored if "relative_position_bias_table" in name]
    assert all(len(loaded[name]) == 9**2 + 3 and torch.equal(loaded[name][-3:], stored[name][-3:]) for name in tables)
    assert large.forward_tokens(images(size=80)).shape == (3, 26, 32)


def test_a_classifier_of_another_image_size_starts_from_a_student(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(student().state_dict(), file)
    large = create_model("tiny_classifier", checkpoint=file, image_size=80)
    assert large(images(size=80)).shape == (3, 7)
    tables = {tuple(block.attn.relative_position_bias_table.flatten().tolist()) for block in large.blocks}
    assert len(tables) == 1 and len(large.blocks[0].attn.relative_position_bias_table) == 9**2 + 3


def test_a_checkpoint_with_the_options_of_the_references_training_is_read(tmp_path):
    state = student().state_dict()
    options = argparse.Namespace(batch_size=64, output_dir="out")
    torch.save({"model": {"module": state}, "optimizer": {}, "epoch": 3, "args": options}, tmp_path / "weights.pth")
    assert_same_state(read_weights(tmp_path / "weights.pth"), state)


def test_a_file_is_replaced_only_when_asked(tmp_path):
    model, file = classifier(), tmp_path / "weights.safetensors"
    state = convert(model.state_dict(), "timm")
    write(file, state, "timm", model.config)
    with pytest.raises(UserError, match="exists"):
        write(file, state, "timm", model.config)
    write(file, state, "timm", model.config, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_folder_is_replaced_only_when_asked_and_if_it_is_a_models(tmp_path):
    model, other = classifier(), tmp_path / "photographs"
    state = convert(model.state_dict(), "transformers")
    write(tmp_path / "model", state, "transformers", model.config)
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "model", state, "transformers", model.config)
    write(tmp_path / "model", state, "transformers", model.config, force=True)
    assert_same_state(read(tmp_path / "model").ours, model.state_dict())
    other.mkdir()
    with pytest.raises(UserError, match="no folder of a model"):
        write(other, state, "transformers", model.config, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photographs"]


def test_an_index_of_pieces_that_leads_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"lists '\.\./secret\.safetensors'"):
        read(tmp_path)
