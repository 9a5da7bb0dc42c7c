"""Weights as other trainings and libraries leave them: wrapped, in pieces, in variants, without a head."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from beitv2_fast import create_model
from beitv2_fast.config.downstream import FinetuneConfig, SegmentConfig
from beitv2_fast.downstream.classification import start_model
from beitv2_fast.downstream.segmentation.training import start_segmenter
from beitv2_fast.errors import CheckpointError
from beitv2_fast.runs.checkpoints import save_weights
from beitv2_fast.weights import convert
from beitv2_fast.weights import create as models
from beitv2_fast.weights.files import read, write

from ..support.weights import DEPTH, DIM, HEADS, PATCH, SIZE, assert_same_state, classifier, images, student, tokenizer

SHAPE = dict(dim=DIM, depth=DEPTH, heads=HEADS, patch_size=PATCH, image_size=SIZE)
MODELS = {"student": student, "classifier": classifier, "tokenizer": tokenizer}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def inner(state: dict) -> dict:
    """As of a model whose blocks are compiled each."""
    return {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state.items()}


class Holder(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.criterion = net, nn.Linear(2, 2)


WRAPPED = {
    "DDP": lambda m: prefixed("module.", m.state_dict()),
    "torch.compile": lambda m: torch.compile(m).state_dict(),
    "torch.compile in DDP": lambda m: prefixed("module._orig_mod.", m.state_dict()),
    "DDP in torch.compile": lambda m: prefixed("_orig_mod.module.", m.state_dict()),
    "compiled blocks": lambda m: inner(m.state_dict()),
    "FSDP": lambda m: prefixed("_fsdp_wrapped_module.", m.state_dict()),
    "Lightning": lambda m: {"state_dict": prefixed("model.", m.state_dict()), "hyper_parameters": {"lr": 0.1}},
    "Lightning, compiled": lambda m: {"state_dict": prefixed("model._orig_mod.", m.state_dict())},
    "Lightning with its loss": lambda m: {"state_dict": Holder(m).state_dict()},
    "Lightning with an average": lambda m: {
        "state_dict": {
            **prefixed("ema_model.", {n: v + 1 if v.is_floating_point() else v for n, v in m.state_dict().items()}),
            **prefixed("model.", m.state_dict()),
        }
    },
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "an average": lambda m: {"model_ema": m.state_dict(), "epoch": 3},
    "timm's average": lambda m: {"state_dict_ema": prefixed("module.", m.state_dict())},
    "weights and average": lambda m: {"model": m.state_dict(), "model_ema": {"cls_token": torch.zeros(1)}},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_weights_are_found_in_what_wrappers_make_of_them(tmp_path, wrapper, kind):
    model = MODELS[kind]()
    torch.save(WRAPPED[wrapper](model), tmp_path / "w.pth")
    loaded = create_model(checkpoint=tmp_path / "w.pth", **({"heads": HEADS} if kind == "tokenizer" else {}))
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_what_lies_beside_the_model_is_named_once(tmp_path, caplog):
    torch.save(Holder(student()).state_dict(), tmp_path / "w.pth")
    create_model(checkpoint=tmp_path / "w.pth")
    assert [r.message for r in caplog.records] == [
        "entries beside net.* are left out: criterion.weight, criterion.bias"
    ]


def test_weights_of_several_models_are_refused(tmp_path):
    state = student().state_dict()
    torch.save({**prefixed("student.", state), **prefixed("teacher.", state)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"of several models: student\., teacher\.\. Keep those of one"):
        create_model(checkpoint=tmp_path / "w.pth")


def test_a_published_tokenizer_with_its_teacher_beside_it_is_read_as_before():
    plain = dict(convert(tokenizer().state_dict(), "published"))
    with_teacher = {**plain, "teacher_model.model.patch_embed.proj.weight": torch.ones(2)}
    assert_same_state(convert(with_teacher, "beitv2_fast"), convert(plain, "beitv2_fast"))


HELD = {
    "numpy._core.multiarray.scalar": np.float64(0.5),
    "numpy.ndarray": np.ones(3),
    f"{type(Path()).__module__}.PosixPath": argparse.Namespace(output_dir=pathlib.PosixPath("out")),
    "collections.defaultdict": collections.defaultdict(list, loss=[1.0]),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("legacy", [False, True])
def test_types_that_only_running_a_file_would_read_are_named_with_the_way_out(tmp_path, name, legacy):
    file = tmp_path / "w.pth"
    torch.save({"model": student().state_dict(), "about": HELD[name]}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="no PyTorch file of plain tensors") as error:
        create_model(checkpoint=file)
    said = str(error.value)
    assert name.split(".")[0] in said if legacy else name in said  # of the older format the first type alone
    assert 'torch.save(state["model"], "weights.pth")' in said
    torch.save(torch.load(file, weights_only=False)["model"], file)  # the way out
    assert_same_state(create_model(checkpoint=file).state_dict(), student().state_dict())


def folder(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A classifier's folder of transformers, its weights still to be written."""
    write(tmp_path / "hf", convert(classifier().state_dict(), "transformers"), "transformers", classifier().config)
    state = read(tmp_path / "hf").weights
    (tmp_path / "hf" / "model.safetensors").unlink()
    return tmp_path / "hf", dict(state)


def in_pieces(path: Path, state: dict[str, torch.Tensor], stem: str, suffix: str, variant: str = "") -> Path:
    names = list(state)
    files = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, own in files.items():
        part = {name: state[name] for name in own}
        save_weights(part, path / file) if suffix == "safetensors" else torch.save(part, path / file)
    index = path / f"{stem}.{suffix}.index.{variant}json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in files.items() for name in own}}))
    return index


@pytest.mark.parametrize("stem_and_suffix", [("model", "safetensors"), ("pytorch_model", "bin")])
@pytest.mark.parametrize("variant", ["", "fp16."])
def test_weights_in_pieces_are_read_from_their_folder_and_by_their_index(tmp_path, stem_and_suffix, variant):
    path, state = folder(tmp_path)
    index = in_pieces(path, state, *stem_and_suffix, variant)
    for checkpoint in (path, index):
        assert_same_state(create_model(checkpoint=checkpoint).state_dict(), classifier().state_dict())


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
def test_a_variant_is_read_and_several_are_named(tmp_path, name):
    path, state = folder(tmp_path)
    half = {key: value.half() for key, value in state.items()}
    save_weights(half, path / name) if name.endswith("safetensors") else torch.save(half, path / name)
    loaded = read(path)
    assert {value.dtype for value in loaded.weights.values()} == {
        torch.float16
    } and loaded.weights.keys() == state.keys()
    save_weights(half, path / "model.bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"several variants of the weights: model.bf16.safetensors, "):
        read(path)
    save_weights(state, path / "model.safetensors")
    assert_same_state(read(path).weights, state)


def test_pieces_that_are_not_whole_are_refused(tmp_path):
    path, state = folder(tmp_path)
    index = in_pieces(path, state, "model", "safetensors")
    listed = json.loads(index.read_text())
    listed["weight_map"]["another.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"lists another\.weight, which its files do not have"):
        read(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint file .*model-00002-of-00002\.safetensors"):
        read(path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no index of weights in pieces"):
        read(path)


def headless(path: Path, kind: str) -> tuple[Path, nn.Module]:
    """A backbone without a head as other libraries store it, and their model."""
    if kind.startswith("timm"):
        timm = pytest.importorskip("timm")
        theirs = timm.create_model(
            "beitv2_base_patch16_224", img_size=SIZE, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, init_values=0.1,
            num_classes=0, global_pool="avg" if kind == "timm, mean" else "token",
        ).eval()  # fmt: skip
        save_weights(theirs.state_dict(), path / "timm.safetensors")
        return path / "timm.safetensors", theirs
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BeitModel(
        transformers.BeitConfig(
            hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * DIM,
            image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6, drop_path_rate=0.0, use_relative_position_bias=True,
            use_mean_pooling=kind == "BeitModel, mean",
        ),
        add_pooling_layer=kind != "BeitModel, no pooling",
    ).eval()  # fmt: skip
    theirs.save_pretrained(path / "beit")
    return path / "beit", theirs


HEADLESS = ("BeitModel", "BeitModel, mean", "BeitModel, no pooling", "timm, mean", "timm, token")


@pytest.mark.parametrize("kind", HEADLESS)
@torch.no_grad()
def test_a_backbone_without_a_head_is_a_start(tmp_path, kind):
    file, theirs = headless(tmp_path, kind)
    tokens = theirs.forward_features(images()) if kind.startswith("timm") else theirs(images()).last_hidden_state
    config = FinetuneConfig(**SHAPE, weights=file)
    tuned = start_model(config, ["a", "b"], print).eval()
    segmenter = start_segmenter(SegmentConfig(**SHAPE, weights=file, layers=(0, 1, 1, 2)), 3, print).eval()
    norm = theirs.norm if kind.startswith("timm") else theirs.layernorm
    for model in (tuned, segmenter):
        torch.testing.assert_close(norm(model.forward_tokens(images())), tokens, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_create_model_starts_a_classifier_from_a_backbone(tmp_path, monkeypatch):
    file, theirs = headless(tmp_path, "BeitModel, mean")
    small = models.ClassifierConfig(classifier().vit_config, 7)
    monkeypatch.setitem(models.MODELS, "tiny_classifier", small)
    ours = create_model("tiny_classifier", file)
    pooled = theirs(images()).pooler_output
    assert ours.head.weight.shape == (7, DIM)
    tokens = ours.forward_tokens(images())[:, 1:].mean(1)
    torch.testing.assert_close(ours.fc_norm(tokens), pooled, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"'head\.weight' is missing\. A classifier can start from a backbone"):
        create_model(checkpoint=file)
