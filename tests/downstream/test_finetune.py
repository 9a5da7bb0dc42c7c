"""Fine-tuning from students, tokenizers and classifiers: it learns, resumes to the same bits, says what it measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beitv2_fast import create_model
from beitv2_fast.config.downstream import FinetuneConfig
from beitv2_fast.config.options import parse
from beitv2_fast.config.presets import FINETUNE
from beitv2_fast.data.find import find_images
from beitv2_fast.data.views import EvalView
from beitv2_fast.downstream import classification
from beitv2_fast.downstream.classification import HEAD_SCALE, crop_share, start_model
from beitv2_fast.models.positions import resize_bias_table, resize_embedding
from beitv2_fast.models.vit import normalize
from beitv2_fast.train import evaluate as evaluate_command
from beitv2_fast.train import finetune as finetune_command
from beitv2_fast.weights.build import load_run_model
from beitv2_fast.weights.start import reading_normalized

from ..support.downstream import COLORS, EVALUATE, results, write_colors
from ..support.training import ROOT, TINY, assert_same_bits, call, checkpoints, last_weights, run

PLAIN = "--augment-ops 0 --erasing 0 --mixup 0 --cutmix 0 --smoothing 0".split()
SHARP = "--epochs 12 --lr 2e-2 --lr-batch 4 --layer-decay 0.9".split()


@pytest.fixture(scope="module")
def runs(starts, tmp_path_factory) -> Path:
    """A folder with data/train and data/val of three classes, a tokenizer, a pre-training and a fine-tuning of it."""
    folder = shutil.copytree(starts, tmp_path_factory.mktemp("finetune") / "runs")
    write_colors(folder / "data" / "train", 4)
    write_colors(folder / "data" / "val", 3)
    assert finetune(folder, "tuned") == 0
    return folder


def finetune(runs: Path, out: str, *more: object, weights: str = "pretrain", data: str = "data") -> int:
    return call("finetune", *TINY, "--data", runs / data, "--weights", runs / weights, "--out", runs / out, *more)


def config(runs: Path, weights: str, *more: object) -> FinetuneConfig:
    options = [*TINY, "--weights", runs / weights, *more]
    return parse(FinetuneConfig, FINETUNE, [str(option) for option in options])[0]


def test_it_starts_as_the_student_with_its_bias_table_in_every_layer_and_a_small_new_head(runs):
    said: list[str] = []
    model = start_model(config(runs, "pretrain"), ["a", "b"], said.append).eval()
    student = load_run_model(runs / "pretrain")[0]
    assert model.rel_pos_bias is None and student.rel_pos_bias is not None
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_tokens(x), student.forward_tokens(x), rtol=1e-5, atol=1e-5)
    assert 0 < model.head.weight.std() < 2 * HEAD_SCALE and "head.weight" in said[0]


def test_the_tokenizer_s_encoder_is_trained_from_its_weights_and_learns(runs):
    assert finetune(runs, "still_tokenizer", *STILL, weights="tokenizer") == 0
    encoder = {n.removeprefix("encoder."): w for n, w in last_weights(runs / "tokenizer").items() if "encoder." in n}
    assert_starts_from(reading_normalized(encoder), runs / "still_tokenizer")
    assert finetune(runs, "tuned_tokenizer", *PLAIN, *SHARP, weights="tokenizer") == 0
    assert results(runs / "tuned_tokenizer")["weights"]["top1"] == 1.0


def test_it_learns_to_tell_colors(runs):
    assert finetune(runs, "learned", *PLAIN, *SHARP) == 0
    found = results(runs / "learned")
    assert found["weights"]["top1"] == found["average"]["top1"] == 1.0
    first = json.loads((runs / "learned" / "evaluation.jsonl").read_text().splitlines()[0])
    assert found["weights"]["loss"] < 0.5 * first["weights_loss"]


def test_every_epoch_is_evaluated_or_every_few_and_the_last(runs):
    def steps(run: str) -> list[int]:
        return [json.loads(line)["step"] for line in (runs / run / "evaluation.jsonl").read_text().splitlines()]

    assert steps("tuned") == [3, 6, 9]
    assert finetune(runs, "seldom", "--eval-every", 2) == 0
    assert steps("seldom") == [6, 9]
    assert_same_bits(runs / "seldom", runs / "tuned")


def test_evaluate_alone_repeats_the_last_numbers_and_trains_nothing(runs):
    shutil.copytree(runs / "tuned", runs / "evaluated")
    (runs / "evaluated" / "results.json").unlink()
    assert finetune(runs, "evaluated", "--evaluate") == 0
    assert results(runs / "evaluated") == results(runs / "tuned")
    assert_same_bits(runs / "evaluated", runs / "tuned")


STILL = "--lr 1e-12 --weight-decay 0 --epochs 1".split()  # the weights stay what they start from, but for 1e-9


def assert_starts_from(weights: dict[str, torch.Tensor], run_folder: Path) -> None:
    """A run that stood still has these weights."""
    found = last_weights(run_folder)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


def test_intermediate_fine_tuning_passes_all_but_the_head_on_to_the_next_label_set(runs, capsys):
    write_colors(runs / "other" / "train", 3, ("blue", "green"))
    for name in ("cyan", "white"):
        shutil.copytree(runs / "other" / "train" / "blue", runs / "other" / "train" / name)
    assert finetune(runs, "intermediate", *SHARP, data="other") == 0  # of four classes
    assert not (runs / "intermediate" / "results.json").exists()  # nothing to evaluate on, as with ImageNet-21k
    assert finetune(runs, "intermediate", *SHARP, "--evaluate", data="other") == 2
    assert f"{runs / 'other'} has no images to evaluate on" in capsys.readouterr().err
    assert finetune(runs, "after", *STILL, weights="intermediate") == 0
    passed = {name: w for name, w in last_weights(runs / "intermediate").items() if not name.startswith("head.")}
    assert_starts_from(passed, runs / "after")
    tables = [passed[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(2)]
    assert not torch.equal(*tables)  # each block has learned its own
    head = last_weights(runs / "after")["head.weight"]
    assert head.shape == (3, 24) and head.abs().max() < 0.01
    assert results(runs / "after")["classes"] == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # the commands of the reference's get_started_for_image_classification.md, for a batch of 1024 (4096)
        ("base", (100, 5e-4, 1024, 20, 0.65, 0.1, 0.8, 1.0)),
        ("base_1600", (100, 5e-4, 1024, 20, 0.6, 0.2, 0.8, 1.0)),
        ("large", (50, 5e-4, 1024, 5, 0.8, 0.2, 0.8, 1.0)),
        ("large_1600", (50, 2e-4, 1024, 5, 0.8, 0.2, 0.8, 1.0)),
        ("base_intermediate", (90, 6e-4, 4096, 20, 0.75, 0.1, 0.8, 1.0)),
        ("large_intermediate", (90, 6e-4, 4096, 20, 0.75, 0.2, 0.8, 1.0)),
        ("base_after_intermediate", (30, 5e-5, 1024, 20, 0.75, 0.1, 0.0, 0.0)),
        ("large_after_intermediate", (20, 7e-5, 1024, 5, 0.8, 0.25, 0.0, 0.0)),
        ("large_384_after_intermediate", (20, 7e-5, 1024, 5, 0.8, 0.25, 0.0, 0.0)),
    ],
)
def test_presets_are_the_reference_s_commands(name, expected):
    c = FINETUNE[name]
    assert (c.epochs, c.lr, c.lr_batch, c.warmup_epochs, c.layer_decay, c.drop_path, c.mixup, c.cutmix) == expected
    assert (c.min_lr, c.weight_decay, c.smoothing, c.erasing, HEAD_SCALE) == (1e-6, 0.05, 0.1, 0.25, 1e-3)
    assert (c.augment_policy, c.ema_decay, c.image_size) == ("rand-m9-mstd0.5-inc1", 0, 384 if "384" in name else 224)
    assert (c.dim, c.depth) == ((1024, 24) if name.startswith("large") else (768, 12))


def test_timm_s_policy_augments_the_training_s_images_by_torchvision_s_loader(runs, monkeypatch):
    pytest.importorskip("timm")
    seen = []
    monkeypatch.setattr(finetune_command, "train", lambda task, config, data, *rest, **_: seen.append(data) or 0)
    assert finetune(runs, "policy", "--augment-policy", "rand-m5-n1") == 0
    assert (seen[0].view.policy, seen[0].loader) == ("rand-m5-n1", "torchvision")
    assert finetune(runs, "dali", "--augment-policy", "rand-m5-n1", "--loader", "dali", "--no-in-memory") == 2


@pytest.mark.parametrize(("size", "given", "share"), [(224, None, 0.875), (384, None, 1.0), (224, 0.9, 0.9)])
def test_the_center_crop_grows_with_the_image_size_unless_it_is_given(size, given, share):
    assert crop_share(given, size) == share


def test_another_label_set_gets_a_new_head_and_the_same_one_keeps_it(runs):
    write_colors(runs / "two" / "train", 4, ("blue", "red"))
    tuned = load_run_model(runs / "tuned")[0]
    same = start_model(config(runs, "tuned"), sorted(COLORS), print)
    assert torch.equal(same.head.weight, tuned.head.weight)
    renamed = start_model(config(runs, "tuned"), ["a", "b", "c"], print)
    assert not torch.equal(renamed.head.weight, tuned.head.weight)
    assert torch.equal(renamed.fc_norm.weight, tuned.fc_norm.weight)
    assert finetune(runs, "two_classes", weights="tuned", data="two") == 0
    assert last_weights(runs / "two_classes")["head.weight"].shape == (2, 24)


def test_at_another_resolution_it_starts_from_resized_positions_and_all_else_as_it_was(runs):
    student, encoder = last_weights(runs / "pretrain"), last_weights(runs / "tokenizer")
    assert finetune(runs, "larger", "--image-size", 48, *STILL) == 0
    table = resize_bias_table(student["rel_pos_bias.relative_position_bias_table"], (6, 6))
    wanted = {f"blocks.{i}.attn.relative_position_bias_table": table for i in range(2)}
    wanted["blocks.1.mlp.fc1.weight"] = student["blocks.1.mlp.fc1.weight"]
    assert_starts_from(wanted, runs / "larger")
    assert finetune(runs, "larger_tokenizer", "--image-size", 48, *STILL, weights="tokenizer") == 0
    assert_starts_from({"pos_embed": resize_embedding(encoder["encoder.pos_embed"], (6, 6))}, runs / "larger_tokenizer")


def test_a_classifier_is_evaluated_at_another_resolution_with_resized_positions(runs):
    assert finetune(runs, "sure", *SHARP) == 0
    command = ["--model", runs / "sure", "--data", runs / "data" / "val", "--image-size", 48, *EVALUATE]
    assert call("evaluate", *command, "--out", runs / "evaluated_larger") == 0
    found = results(runs / "evaluated_larger")["rows"][0]
    model = load_run_model(runs / "sure", 48)[0]
    images = find_images(runs / "data" / "val")
    x = torch.stack([EvalView(48, 1.0)(images.open(i))["image"] for i in range(len(images))])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(normalize(x)), torch.tensor(images.labels))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["loss"] != pytest.approx(results(runs / "sure")["weights"]["loss"], rel=1e-5)


def test_a_fine_tuned_run_is_read_by_create_model_and_converts(runs):
    model = create_model(None, runs / "tuned")
    assert model.config.num_classes == 3 and model.vit_config.position == "absolute_relative"
    stored = last_weights(runs / "tuned")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--val", "{runs}/images"], "has no classes"),
        (["--data", "{runs}/images"], "at least two class folders"),
        (["--weights", "{runs}/nothing"], "nothing"),
        (["--evaluate"], "no finished step"),
    ],
)
def test_mistakes_end_with_one_paragraph_that_says_what_to_do(runs, tmp_path, capsys, options, said):
    given = [option.format(runs=runs) for option in options]
    assert finetune(runs, str(tmp_path / "run"), *given) == 2
    assert said in capsys.readouterr().err


def test_other_classes_in_the_same_run_folder_are_refused(runs, capsys):
    shutil.copytree(runs / "tuned", runs / "refused")
    shutil.copytree(runs / "data", runs / "changing")
    stored = runs / "refused" / "config.json"
    stored.write_text(stored.read_text().replace(f"{runs}/data", f"{runs}/changing"))
    (runs / "changing" / "train" / "blue").rename(runs / "changing" / "train" / "azure")
    (runs / "refused" / "images.jsonl").unlink()
    assert finetune(runs, "refused", data="changing") == 2
    assert "was trained for 3 classes (blue" in capsys.readouterr().err


def test_folders_with_some_or_all_classes_are_evaluated_in_one_table(runs):
    write_colors(runs / "some", 2, ("green", "red"))
    command = ["--model", runs / "tuned", "--data", runs / "data" / "val", runs / "some", "--out", runs / "table"]
    assert call("evaluate", *command, *EVALUATE) == 0
    rows = results(runs / "table")["rows"]
    found = [(row["folder"], row["model"], row["classes"], row["images"]) for row in rows]
    assert found == [(f, m, c, n) for f, c, n in (("val", 3, 9), ("some", 2, 4)) for m in ("weights", "average")]
    tuned = results(runs / "tuned")
    for row in rows[:2]:
        assert {key: row[key] for key in ("top1", "top5", "loss")} == pytest.approx(
            {key: tuned[row["model"]][key] for key in ("top1", "top5", "loss")}, rel=1e-5
        )


def test_an_interrupted_evaluation_goes_on_with_what_is_missing_unless_the_weights_have_changed(runs, monkeypatch):
    command = ["--model", runs / "again", "--data", runs / "data" / "val", "--out", runs / "interrupted"]
    command += EVALUATE
    shutil.copytree(runs / "tuned", runs / "again")
    assert call("evaluate", *command) == 0
    whole = results(runs / "interrupted")
    file, counted = runs / "interrupted" / "results.json", []
    evaluate = evaluate_command.evaluate_classifier
    monkeypatch.setattr(evaluate_command, "evaluate_classifier", lambda *a, **k: counted.append(0) or evaluate(*a, **k))
    file.write_text(json.dumps({**whole, "rows": whole["rows"][:1]}))
    assert call("evaluate", *command) == 0
    assert results(runs / "interrupted") == whole and len(counted) == 1
    assert call("evaluate", *command) == 0 and len(counted) == 1
    last = runs / "again" / "checkpoints" / checkpoints(runs / "again")[-1] / "model.safetensors"
    last.touch()
    assert call("evaluate", *command) == 0 and len(counted) == 3


def test_a_file_of_weights_needs_to_be_told_its_classes(runs, capsys):
    file = runs / "tuned" / "checkpoints" / checkpoints(runs / "tuned")[-1] / "ema.safetensors"
    command = ["--model", file, "--data", runs / "data" / "val", "--out", runs / "of_file", "--workers", 0]
    assert call("evaluate", *command) == 2
    assert "Give --classes" in capsys.readouterr().err
    (runs / "two.txt").write_text("blue\nred\n")
    assert call("evaluate", *command, "--classes", runs / "two.txt") == 2
    assert "names 2 classes, the classifier has 3" in capsys.readouterr().err
    assert call("evaluate", *command, *EVALUATE, "--classes", runs / "data" / "train") == 0
    loss = results(runs / "of_file")["rows"][0]["loss"]
    assert loss == pytest.approx(results(runs / "tuned")["average"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_zero_3_trains_averages_and_evaluates_as_plain_torch(runs):
    pytest.importorskip("deepspeed")
    from ..training.test_interruption import free_port

    rank = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    options = [*TINY, "--data", runs / "data", "--weights", runs / "pretrain", "--out", runs / "zero3"]
    done = run("finetune", *options, "--deepspeed-config", ROOT / "train" / "configs" / "zero3.json", **rank)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DeepSpeed ZeRO 3" in done.stdout
    last = checkpoints(runs / "zero3")[-1]
    for file in ("model", "ema"):
        ours, plain = (load_file(runs / r / "checkpoints" / last / f"{file}.safetensors") for r in ("zero3", "tuned"))
        assert ours.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)
    found, wanted = results(runs / "zero3"), results(runs / "tuned")
    assert found["average"] == pytest.approx(wanted["average"], rel=1e-4)
    assert found["weights"] == pytest.approx(wanted["weights"], rel=1e-4)


def test_the_weights_of_the_best_epoch_are_kept(runs, monkeypatch):
    """Epochs of 3 steps; the second is the best, the third only as good."""
    scores = iter([0.3, 0.6, 0.6, 0.5])  # the last of the run that starts from it
    found = {"top5": 1.0, "loss": 1.0, "images": 9}
    monkeypatch.setattr(classification, "evaluate_classifier", lambda *_, **__: {"top1": next(scores), **found})
    out = runs / "best_of_three"
    assert finetune(runs, out.name, "--ema-decay", 0, "--keep-checkpoints", 3) == 0
    best = load_file(out / "best" / "model.safetensors")
    at_6, at_9 = (load_file(out / "checkpoints" / f"step_0000000{s}" / "model.safetensors") for s in (6, 9))
    assert all(torch.equal(best[name], at_6[name]) for name in at_6)
    assert not torch.equal(best["head.weight"], at_9["head.weight"])
    started = finetune(runs, "from_best", *STILL, "--ema-decay", 0, weights=f"{out.name}/best/model.safetensors")
    assert started == 0
    assert_starts_from(at_6, runs / "from_best")


def test_the_average_is_kept_where_it_is_better(runs, monkeypatch):
    scores = iter([0.3, 0.4, 0.2, 0.1, 0.3, 0.3])  # weights, average
    found = {"top5": 1.0, "loss": 1.0, "images": 9}
    monkeypatch.setattr(classification, "evaluate_classifier", lambda *_, **__: {"top1": next(scores), **found})
    out = runs / "best_average"
    assert finetune(runs, out.name, "--keep-checkpoints", 3) == 0
    best, average = load_file(out / "best" / "model.safetensors"), out / "checkpoints" / "step_00000003"
    average = load_file(average / "ema.safetensors")
    assert all(torch.equal(best[name], average[name]) for name in average)
