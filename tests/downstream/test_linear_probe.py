"""The probes of a frozen backbone: which features they read, what they write, and that a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beitv2_fast.config.downstream import ProbeConfig
from beitv2_fast.data.find import find_images
from beitv2_fast.distributed import World
from beitv2_fast.downstream.probes.backbones import completed
from beitv2_fast.downstream.probes.exact import balanced_accuracy, few_shot
from beitv2_fast.downstream.probes.features import Extractor, feature_names, global_features
from beitv2_fast.errors import UserError
from beitv2_fast.models.features import features
from beitv2_fast.models.vit import normalize
from beitv2_fast.train.linear_probe import compared, probe_row
from beitv2_fast.weights.build import load_run_model
from beitv2_fast.weights.create import open_model

from ..support.downstream import results, write_colors
from ..support.training import TINY, call

OPTIONS = "--preset demo --device cpu --workers 0 --seeds 2 --layers 1 2 --epochs 3 --shots 1 2".split()


@pytest.fixture(scope="module")
def runs(starts, tmp_path_factory) -> Path:
    """data/train and data/test of three classes, a tokenizer, a pre-training and its probe."""
    folder = shutil.copytree(starts, tmp_path_factory.mktemp("probe") / "runs")
    write_colors(folder / "data" / "train", 8)
    write_colors(folder / "data" / "test", 3)
    assert probe(folder, "probe", "--exact") == 0
    return folder


def probe(runs: Path, out: str, *more: object) -> int:
    options = [*OPTIONS, "--data", runs / "data", "--run", runs / "pretrain", "--tokenizer", runs / "tokenizer"]
    return call("linear_probe", *options, "--out", runs / out, *more)


def test_features_are_the_aggregated_cls_token_the_mean_and_those_of_each_block(runs):
    model = load_run_model(runs / "pretrain")[0]
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found, whole = global_features(model, (1, 2))(x), features(model, x)
        last, _ = model.encode(normalize(x))
        first = model.blocks[0](model.embed(normalize(x)), model.position_bias())
    wanted = [whole.cls, whole.patches.mean(1), first[:, 0], first[:, 1:].mean(1), last[:, 0], last[:, 1:].mean(1)]
    torch.testing.assert_close(found, torch.stack(wanted, 1), rtol=1e-5, atol=1e-5)
    assert len(feature_names((1, 2))) == found.shape[1]
    assert not model.blocks[0]._forward_hooks


def test_the_table_has_every_probe_of_every_row(runs):
    found = results(runs / "probe")
    names = [row["features"] for row in found["rows"]]
    assert names[:4] == [f"{n}, {k}" for n in ("pre-trained", "untrained") for k in ("CLS token", "mean of patches")]
    assert names[4].startswith("pixels") and names[5].startswith("teacher")
    for row in found["rows"]:
        assert row["knn"].keys() == {"10", "20"} and row["few_shot"].keys() == {"1", "2"}
        assert row["knn_std"].keys() == {"10", "20"} and 0 <= row["error"] <= found["error"]
        assert len(row["runs"]) == len(row["few_shot"]["2"]["runs"]) == 2
    assert names[4] and found["rows"][4]["knn"]["10"] == 1.0  # noisy colors: pixels tell them
    assert [row["features"] for row in found["sweep"]] == feature_names((1, 2))
    assert all(0 <= row["top1"] <= 1 and row["top5"] is None for row in found["sweep"])


def test_without_the_exact_probe_the_sweep_s_numbers_stand_for_the_rows(runs):
    assert probe(runs, "swept", "--no-exact") == 0
    found, exact = results(runs / "swept"), results(runs / "probe")
    assert found["metric"] == "top-1 accuracy" and found["sweep"] == exact["sweep"]
    assert [row["mean"] for row in found["rows"]] == [row["top1"] for row in found["sweep"][:2]]
    assert [row["knn"] for row in found["rows"]] == [row["knn"] for row in exact["rows"][:2]]


def test_a_stopped_probe_reads_its_features_again_unless_something_changed(runs, tmp_path):
    splits, world = {"test": find_images(runs / "data" / "test")}, World(0, 1, torch.device("cpu"))
    calls = []

    def function(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.mean((2, 3))

    def extract(key: str, size: int = 8) -> torch.Tensor:
        return Extractor(splits, tmp_path, world, batch_size=4, workers=0)("name", size, function, key)["test"]

    first = extract("step 1")
    assert len(calls) == 3 and torch.equal(extract("step 1"), first) and len(calls) == 3
    extract("step 2"), extract("step 1", size=16)
    assert len(calls) == 9
    extract(""), extract("")
    assert len(calls) == 15


def test_a_balanced_accuracy_has_the_standard_error_of_its_classes_images():
    labels, predicted = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 1])
    found = balanced_accuracy(predicted, labels, 3)  # 3 of 4 and 1 of 2; no image of class 1
    assert found.accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.error == pytest.approx((3 / 4 * 1 / 4 / 4 + 1 / 2 * 1 / 2 / 2) ** 0.5 / 2)
    many = balanced_accuracy(predicted.repeat(100), labels.repeat(100), 3)
    assert many.accuracy == pytest.approx(found.accuracy) and many.error == pytest.approx(found.error / 10)


def test_every_network_of_a_row_has_its_neighbors():
    """One of two networks tells the classes, the other tells them wrong."""
    labels = torch.arange(8) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    by_seed = [{"train": right, "test": right}, {"train": right, "test": 1 - right}]
    config = ProbeConfig(neighbors=(3,), shots=(), seeds=2)
    row = probe_row(("untrained", by_seed), {"train": labels, "test": labels}, config, torch.device("cpu"))
    assert (row["knn"], row["error"]) == ({"3": 0.5}, 0.0)
    assert row["knn_std"]["3"] == pytest.approx(0.5**0.5)


def test_pixels_of_gray_images_are_those_of_one_channel(runs):
    class Extract:
        device = torch.device("cpu")

        def __init__(self, images):
            self.images = images

        def __call__(self, name, size, function, key=""):
            return {"train": function(self.images), "test": function(self.images[:2])}

    gray = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    almost = gray.clone()
    almost[1, 2, 3, 4] += 0.5
    for images, wanted in ((gray, gray[:, 0].flatten(1)), (almost, almost.flatten(1))):
        rows = dict(compared(ProbeConfig(seeds=1), open_model(runs / "pretrain"), Extract(images)))
        (pixels,) = rows["pixels, 32x32"]
        assert torch.equal(pixels["train"], wanted)
        assert torch.equal(pixels["test"], wanted[:2])


def test_few_shots_see_so_many_images_of_each_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    x = torch.nn.functional.one_hot(labels, 3) + 0.8 * torch.randn(90, 3, generator=generator)
    one, many = (few_shot(x, labels, x, labels, n, range(5)).runs for n in (1, 20))
    assert len(set(one)) > 1 and sum(many) > sum(one)
    seen = []
    few_shot(Spy(x, seen), labels, x, labels, 4, [0])
    assert torch.bincount(labels[seen[0]]).tolist() == [4, 4, 4]


def test_images_and_tokenizer_are_those_of_the_run_where_none_are_named(runs, tmp_path):
    _, stored = open_model(runs / "pretrain")
    named = completed(ProbeConfig(run=runs / "pretrain"), replace(stored, data=runs / "data"))
    assert (named.data, named.tokenizer) == (runs / "data", stored.tokenizer)
    moved = completed(ProbeConfig(run=runs / "pretrain"), replace(stored, tokenizer=runs / "gone"))
    assert moved.tokenizer == runs / "tokenizer"
    copied = shutil.copytree(runs / "pretrain", tmp_path / "pretrain")
    alone = completed(ProbeConfig(run=copied, data=runs), replace(stored, tokenizer=runs / "gone"))
    assert alone.tokenizer is None
    given = ProbeConfig(run=runs / "pretrain", data=runs / "other", tokenizer=runs / "mine")
    assert completed(given, stored) == given
    with pytest.raises(UserError, match=r"nothing says which images student\.pth was trained on"):
        completed(ProbeConfig(run=Path("student.pth")), stored)  # a published student's config is not its training's


@pytest.mark.parametrize(
    ("options", "title", "columns"),
    [
        (["--run", "{runs}/tokenizer"], "VQ-KD encoder", feature_names((1, 2))),
        (["--backbone", "untrained"], "untrained", feature_names((1, 2))),
        (["--run", "{runs}/tuned"], "fine-tuned", feature_names((1, 2))),
    ],
)
def test_every_kind_of_network_is_probed_as_the_student_is(runs, options, title, columns):
    given = [option.format(runs=runs) for option in options]
    if title == "fine-tuned":
        common = [*TINY, "--epochs", 1, "--data", runs / "data", "--weights", runs / "pretrain"]
        assert call("finetune", *common, "--out", runs / "tuned") == 0
    assert probe(runs, title.replace(" ", "_"), *given, "--no-exact") == 0
    found = results(runs / title.replace(" ", "_"))
    assert [row["features"] for row in found["rows"]] == [f"{title}, {column}" for column in columns[:2]]
    assert [row["features"] for row in found["sweep"]] == columns
    learned = "(efficientnet_lite0@10) learned from ImageNet's labels"
    said = "fine-tuned with labels" if title == "fine-tuned" else learned
    assert said in found["notes"][0]


def test_a_tokenizer_s_features_are_those_of_its_encoder_and_of_each_of_its_blocks(runs):
    model = load_run_model(runs / "tokenizer")[0]
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found, whole = global_features(model, (2,))(x), features(model, x)
        tokens = model.encoder.forward_tokens(2 * x - 1)
    wanted = [whole.cls, whole.patches.mean(1), tokens[:, 0], tokens[:, 1:].mean(1)]
    torch.testing.assert_close(found, torch.stack(wanted, 1), rtol=1e-5, atol=1e-5)


def test_the_untrained_network_of_exact_is_that_of_backbone_untrained(runs):
    assert probe(runs, "untrained_exact", "--backbone", "untrained") == 0
    ours = {row["features"]: row for row in results(runs / "untrained_exact")["rows"]}
    assert list(ours) == ["untrained, CLS token", "untrained, mean of patches"]
    exact = {row["features"]: row for row in results(runs / "probe")["rows"]}
    assert all(ours[name]["knn"] == exact[name]["knn"] for name in ours)
    assert all(ours[name]["runs"][0] == exact[name]["runs"][0] for name in ours)  # the first seed's network


def test_the_teacher_is_that_of_the_tokenizer(runs):
    without_layers = [*OPTIONS[: OPTIONS.index("--layers")], *OPTIONS[OPTIONS.index("--epochs") :], "--no-exact"]
    given = ["--data", runs / "data", "--run", runs / "tokenizer", "--backbone", "teacher", "--out", runs / "teacher"]
    assert call("linear_probe", *without_layers, *given, "--tokenizer", runs / "tokenizer") == 0
    ours, exact = results(runs / "teacher")["rows"], results(runs / "probe")["rows"]
    assert [row["features"] for row in ours] == [exact[5]["features"]] and ours[0]["knn"] == exact[5]["knn"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backbone", "teacher"], "a teacher is probed as a whole"),
        (["--layers", 3], "the network has 2 blocks"),
    ],
)
def test_mistakes_end_with_one_paragraph_that_says_what_to_do(runs, capsys, options, said):
    assert probe(runs, "refused", *[str(option).format(runs=runs) for option in options]) == 2
    assert said in capsys.readouterr().err


class Spy:
    """Features that note which rows are read."""

    def __init__(self, x: torch.Tensor, seen: list):
        self.x, self.seen = x, seen

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen.append(rows)
        return self.x[rows]


def test_the_sweep_s_classifiers_are_kept_and_evaluated_again(runs):
    """On the same images they are as good as then, and nothing is fitted or written over."""
    swept = {row["features"]: row["top1"] for row in results(runs / "probe")["sweep"]}
    before = results(runs / "probe")
    assert probe(runs, "probe", "--exact", "--evaluate") == 0
    last = json.loads((runs / "probe" / "evaluation.jsonl").read_text().splitlines()[-1])
    assert {name: value for name, value in last.items() if name != "step"} == pytest.approx(swept)
    assert results(runs / "probe") == before
    assert probe(runs, "nothing", "--evaluate") == 2
