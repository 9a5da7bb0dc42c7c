"""Trained models as folders for a hub: what is in them comes back, their card tells the training and no path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import beitv2_fast
from beitv2_fast import cli, from_pretrained, save_pretrained
from beitv2_fast.config.presets import FINETUNE, PRETRAIN, TOKENIZER
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.errors import UserError
from beitv2_fast.weights.create import open_model
from beitv2_fast.weights.pretrained import nearest_preset

from ..support.release_server import serving
from ..support.small_runs import small_runs
from ..support.training import TINY, call, write_images
from ..support.weights import assert_same_state, classifier, student, tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("make", [tokenizer, student, classifier])
def test_a_saved_model_comes_back_with_its_config_and_every_bit(tmp_path, make):
    model = make()
    save_pretrained(model, tmp_path / "model")
    found = from_pretrained(tmp_path / "model")
    assert found.config == model.config and type(found) is type(model)
    assert_same_state(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_a_run_s_folder_is_the_run_s_model_and_training(root, tmp_path, stage):
    assert cli.run_command(["convert", str(root / stage), str(tmp_path / "hub"), "--to", "beitv2_fast"]) == 0
    (model, config), (expected, stored) = open_model(tmp_path / "hub"), open_model(root / stage)
    assert model.config == expected.config and type(config) is type(stored)
    assert_same_state(model.state_dict(), expected.state_dict())
    assert (config.lr, config.epochs, config.seed) == (stored.lr, stored.epochs, stored.seed)


def test_a_card_tells_config_preset_data_and_metrics_and_no_path_of_this_machine(root, tmp_path):
    save_pretrained(root / "tokenizer", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    model, stored = open_model(root / "tokenizer")
    head, _, text = card.removeprefix("---\n").partition("---\n")
    assert "library_name: beitv2-fast" in head and "- tokenizer" in head
    preset, others = nearest_preset(stored)
    assert f"preset `{preset}`, but for:" in text and all(f"| {name} |" in text for name in others)
    assert f"| num_codes | {model.num_codes} |" in text
    assert f"`{stored.data.name}`" in text
    last = json.loads((root / "tokenizer" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| step | {last['step']} |" in text and f"| rec_loss | {last['rec_loss']:.6g} |" in text
    for file in (tmp_path / "hub").iterdir():
        assert str(root).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("presets", [TOKENIZER, PRETRAIN, FINETUNE])
def test_the_nearest_preset_of_a_preset_is_one_with_its_options(presets):
    for name, config in presets.items():
        found, others = nearest_preset(config)
        assert not others and (found == name or not nearest_preset(presets[found])[1])


def test_the_nearest_preset_names_what_differs():
    config = PretrainConfig(**{**vars(PRETRAIN["large"]), "lr": 1.0, "num_masked": 98})
    assert nearest_preset(config) == ("large", {"lr": 1.0, "num_masked": 98})


def test_the_card_s_own_lines_run(tmp_path):
    save_pretrained(classifier(), tmp_path / "hub")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "hub" / "README.md").read_text(), re.S)
    write_images(tmp_path / "images", 1)
    code = code.replace("hf-hub:ORGANIZATION/NAME", str(tmp_path / "hub"))
    names: dict[str, object] = {}
    exec(code.replace("photo.jpg", str(tmp_path / "images" / "00.png")), names)
    assert names["top"].values.shape == (1, 5)


def test_a_repository_with_such_a_folder_serves_every_command(root, tmp_path, monkeypatch):
    save_pretrained(root / "tokenizer", tmp_path / "hub")
    with serving(tmp_path / "cache", monkeypatch) as server:
        server.repositories["me/codes"] = {f.name: f.read_bytes() for f in (tmp_path / "hub").iterdir()}
        model, config = open_model("hf-hub:me/codes@main")
        assert isinstance(config, TokenizerConfig)
        assert_same_state(model.state_dict(), open_model(root / "tokenizer")[0].state_dict())
        out = tmp_path / "codes.npz"
        words = ["encode", str(root / "data"), "--tokenizer", "hf-hub:me/codes", "--out", str(out), "--workers", "0"]
        assert cli.run_command(words) == 0 and out.is_file()


def test_a_fine_tuned_folder_says_its_classes(root, tmp_path):
    images = tmp_path / "images"
    for label in ("crow", "jay"):
        write_images(images / "train" / label, 4)
        write_images(images / "val" / label, 2)
    words = [*TINY, "--data", images, "--weights", "none", "--epochs", 1, "--out", tmp_path / "run"]
    assert call("finetune", *words) == 0
    save_pretrained(tmp_path / "run", tmp_path / "hub")
    words = f"--model {tmp_path / 'hub'} --data {images / 'val'} --out {tmp_path / 'scores'} --workers 0 --device cpu"
    assert call("evaluate", *words.split()) == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    scored = json.loads((tmp_path / "run" / "results.json").read_text())["weights"]["top1"]
    assert f"| weights_top1 | {scored:.6g} |" in card


def test_nothing_else_is_replaced_and_a_model_s_folder_only_by_force(tmp_path):
    (tmp_path / "mine").mkdir()
    for force in (False, True):
        with pytest.raises(UserError, match=r"mine exists. Name another folder\."):
            save_pretrained(student(), tmp_path / "mine", force=force)
    save_pretrained(student(), tmp_path / "hub")
    with pytest.raises(UserError, match="--force"):
        save_pretrained(tokenizer(), tmp_path / "hub")
    assert type(from_pretrained(tmp_path / "hub")) is beitv2_fast.Student
    save_pretrained(tokenizer(), tmp_path / "hub", force=True)
    assert type(from_pretrained(tmp_path / "hub")) is beitv2_fast.Tokenizer


def test_the_weights_are_safetensors_that_say_their_config_themselves(tmp_path):
    save_pretrained(student(), tmp_path / "hub")
    with safe_open(tmp_path / "hub" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["beitv2_fast"])["early_layer"] == 2
    assert from_pretrained(tmp_path / "hub" / "model.safetensors").config == student().config
