"""Probes by AdamW on random crops: what each protocol reads, what it learns, and that its classifiers are kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.config.downstream import ProbeConfig
from beitv2_fast.data.images import read_images
from beitv2_fast.downstream.probes import trained
from beitv2_fast.downstream.probes.features import read_features
from beitv2_fast.downstream.probes.trained import AttentivePool, ProbeHeads, ProbeTask, loop_config
from beitv2_fast.models.features import features
from beitv2_fast.models.vit import normalize
from beitv2_fast.training.optim import Schedule, parameter_groups
from beitv2_fast.weights.build import load_run_model

from ..support.downstream import COLORS, results, write_colors
from ..support.training import assert_resumes_to_the_same_bits, call, last_weights

OPTIONS = "--device cpu --workers 0 --epochs 3 --batch-size 8 --lr 0.3".split()
SIZE = 32


@pytest.fixture(scope="module")
def runs(starts, tmp_path_factory) -> Path:
    """data/train and data/test of three classes, a tokenizer and a pre-training."""
    folder = shutil.copytree(starts, tmp_path_factory.mktemp("trained") / "runs")
    write_colors(folder / "data" / "train", 8)
    write_colors(folder / "data" / "test", 3)
    return folder


def probe(runs: Path, out: str, *more: object, run: str = "pretrain") -> int:
    where = ["--data", runs / "data", "--run", runs / run, "--out", runs / out]
    return call("linear_probe", *OPTIONS, *where, *more)


def blocks_of(vit: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    tokens, bias, found = vit.embed(x), vit.position_bias(), []
    for block in vit.blocks:
        found.append(tokens := block(tokens, bias))
    return found


@torch.no_grad()
@pytest.mark.parametrize("run", ["pretrain", "tokenizer"])
def test_each_protocol_reads_its_features_of_the_frozen_network(runs, run):
    model, x = load_run_model(runs / run)[0], torch.rand(3, 3, SIZE, SIZE)
    student = run == "pretrain"
    vit, norm = (model, model.norm) if student else (model.encoder, model.encoder.fc_norm)
    one, two = blocks_of(vit, normalize(x) if student else 2 * x - 1)

    names, read = read_features(model, "blocks", ())
    assert [name.rsplit(" ", 1)[1] for name in names] == ["1", "2"]
    wanted = [torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1) for tokens in (one, two)]
    torch.testing.assert_close(read(x), torch.stack(wanted, 1))
    torch.testing.assert_close(read_features(model, "blocks", (2,))[1](x), wanted[1][:, None])

    _, read = read_features(model, "concatenated", ())  # the last four, of two
    wanted = torch.cat([norm(one)[:, 0], norm(two)[:, 0], norm(two)[:, 1:].mean(1)], 1)
    torch.testing.assert_close(read(x), wanted[:, None])
    torch.testing.assert_close(read_features(model, "concatenated", (2,))[1](x)[:, 0], wanted[:, 24:])

    torch.testing.assert_close(read_features(model, "attentive", ())[1](x), features(model, x).patches)


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (24, 1)])
def test_the_query_s_attention_is_that_of_its_formula(width, heads):
    torch.manual_seed(0)
    pool, patches = AttentivePool(width), torch.randn(3, 5, width)
    torch.nn.init.normal_(pool.query)
    keys, values = pool.key_value(patches).chunk(2, -1)
    wanted = []
    for k, v, q in zip(keys.chunk(heads, -1), values.chunk(heads, -1), pool.query.chunk(heads), strict=True):
        weights = (k @ q / (width // heads) ** 0.5).softmax(1)  # [B, N]
        wanted.append((weights[..., None] * v).sum(1))
    torch.testing.assert_close(pool(patches), torch.cat(wanted, -1)[:, None])


def test_every_feature_has_a_classifier_of_its_own_that_no_other_influences():
    torch.manual_seed(0)
    heads, x, labels = ProbeHeads(2, 6, 4), torch.randn(5, 2, 6), torch.tensor([0, 1, 2, 3, 0])
    torch.nn.init.normal_(heads.bias)
    loss, _ = ProbeTask(heads, lambda images: x).loss(heads, {"image": x, "label": labels})
    loss.backward()
    for i in range(2):
        layer = torch.nn.Linear(6, 4)
        layer.load_state_dict({"weight": heads.weight[i], "bias": heads.bias[i]})
        torch.testing.assert_close(heads(x)[:, i], layer(x[:, i]))
        F.cross_entropy(layer(x[:, i]), labels).backward()
        torch.testing.assert_close(heads.weight.grad[i], layer.weight.grad)


def test_the_training_is_that_of_beit_s_protocol():
    config = loop_config(ProbeConfig())
    schedule = Schedule.of(config, 1_281_167, 8)
    assert (schedule.epochs, schedule.images_per_step, schedule.peak_lr) == (100, 512, 1e-3 * 512 / 256)
    assert schedule.lr(0) == schedule.peak_lr and schedule.lr(schedule.total_steps) == 0
    assert config.clip_grad == 0 and config.betas == (0.9, 0.999)
    groups = {tuple(g["names"]): g["weight_decay"] for g in parameter_groups(ProbeHeads(12, 8, 4), config.weight_decay)}
    assert groups == {("weight",): 1e-4, ("bias",): 0.0}
    heads = ProbeHeads(12, 768, 10)
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02) and not heads.bias.any()


@pytest.mark.parametrize("protocol", ["blocks", "concatenated", "attentive"])
def test_a_probe_learns_resumes_and_its_kept_classifiers_are_evaluated_again(runs, protocol):
    assert probe(runs, protocol, "--protocol", protocol) == 0
    found = results(runs / protocol)
    assert found["protocol"] == protocol and len(found["rows"]) == (2 if protocol == "blocks" else 1)
    assert "(efficientnet_lite0@10) learned from ImageNet's labels" in found["notes"][0]
    assert max(row["top1"] for row in found["rows"]) > 0.6  # three colors, chance a third
    model, state = load_run_model(runs / "pretrain")[0], last_weights(runs / protocol)
    heads = ProbeHeads(*[state["weight"].shape[i] for i in (0, 2, 1)], protocol == "attentive")
    heads.load_state_dict(state)
    files = sorted((runs / "data" / "test").rglob("*.png"))
    x = read_images(files, SIZE, 224 / 256)
    labels = torch.tensor([list(COLORS).index(file.parent.name) for file in files])
    with torch.no_grad():
        right = heads(read_features(model, protocol, ())[1](x)).argmax(-1) == labels[:, None]
    assert [row["mean"] for row in found["rows"]] == pytest.approx(right.double().mean(0).tolist())

    before = (runs / protocol / "evaluation.jsonl").read_text().splitlines()
    assert len(before) == 3  # after every epoch
    assert probe(runs, protocol, "--protocol", protocol, "--evaluate") == 0
    after = (runs / protocol / "evaluation.jsonl").read_text().splitlines()
    assert len(after) == 4 and json.loads(after[-1]) == json.loads(before[-1])
    assert results(runs / protocol) == found


def test_a_stopped_probe_goes_on_to_the_same_bits_and_sees_new_crops_in_every_epoch(runs, monkeypatch):
    seen, loss = {}, ProbeTask.loss

    def noted(self, model, batch):
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            seen.setdefault(index, []).append(image)
        return loss(self, model, batch)

    monkeypatch.setattr(ProbeTask, "loss", noted)
    monkeypatch.setattr(trained, "loop_config", lambda config: dataclasses.replace(loop_config(config), save_every=4))
    options = ["--protocol", "attentive"]
    assert probe(runs, "whole", *options) == 0
    assert len(seen) == 24 and all(len(images) == 3 for images in seen.values())
    assert not any(torch.equal(images[0], images[1]) for images in seen.values())
    assert_resumes_to_the_same_bits(lambda out: probe(runs, out.name, *options), runs / "whole")


def test_the_untrained_network_and_the_teacher_are_probed_alike(runs):
    assert probe(runs, "untrained_blocks", "--protocol", "blocks", "--backbone", "untrained") == 0
    assert results(runs / "untrained_blocks")["rows"][0]["features"].startswith("untrained, CLS token and mean")
    teacher = ["--backbone", "teacher", "--protocol", "attentive", "--epochs", 1]
    assert probe(runs, "teacher_attentive", *teacher, run="tokenizer") == 0
    rows = results(runs / "teacher_attentive")["rows"]
    assert [row["features"] for row in rows] == ["teacher (efficientnet_lite0@10), attended patches"]


@pytest.mark.parametrize(
    ("options", "run", "said"),
    [
        (["--protocol", "blocks", "--layers", 3], "pretrain", "the network has 2 blocks"),
        (["--protocol", "attentive", "--layers", 1], "pretrain", "attentive reads the last patches"),
        (["--protocol", "blocks", "--backbone", "teacher"], "tokenizer", "a teacher is probed as a whole"),
        (["--protocol", "blocks", "--evaluate"], "pretrain", "has no checkpoint yet"),
    ],
)
def test_mistakes_end_with_one_paragraph_that_says_what_to_do(runs, capsys, options, run, said):
    assert probe(runs, f"refused_{run}_{len(options)}_{options[1]}", *options, run=run) == 2
    assert said in capsys.readouterr().err
