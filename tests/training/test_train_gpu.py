"""The commands on a GPU for a few steps each: they train, resume to the same bits, and agree with the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.train import pretrain as pretrain_command

from ..support.downstream import SMALL, write_colors, write_scenes
from ..support.gpu import DRY, HERE, cuda_only, deterministic, distance
from ..support.training import (
    PRETRAIN,
    ROOT,
    TINY,
    TOKENIZER,
    Halted,
    assert_resumes_to_the_same_bits,
    call,
    checkpoints,
    last_weights,
    losses,
    run,
    spoil,
    write_images,
)

pytestmark = pytest.mark.gpu
# Six steps of four images; a checkpoint after every third.
OPTIONS = [*TINY, "--device", HERE, "--loader", "torchvision", "--epochs", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return make_runs(tmp_path_factory.mktemp("gpu"))


def make_runs(folder: Path, *more: object) -> Path:
    """Images, pictures of three classes, a teacher's random weights, a tokenizer and a pre-training."""
    timm = pytest.importorskip("timm", reason="timm, whose network is the teacher here, is not installed")
    write_images(folder / "images", 12)
    write_colors(folder / "data" / "train", 4)
    write_colors(folder / "data" / "val", 3)
    torch.manual_seed(0)
    network = timm.create_model("test_vit", pretrained=False, num_classes=0)
    save_file(network.state_dict(), folder / "teacher.safetensors")
    assert tokenizer(folder, "tokenizer", *more) == 0
    assert pretrain(folder, "pretrain", "--layer-scale", 0.1, *more) == 0
    return folder


def tokenizer_options(folder: Path) -> list[object]:
    teacher = ["--teacher", "timm:test_vit", "--teacher-weights", folder / "teacher.safetensors"]
    return [*OPTIONS, *TOKENIZER, "--teacher-image-size", 64, *teacher, "--data", folder / "images"]


def pretrain_options(folder: Path) -> list[object]:
    return [*OPTIONS, *PRETRAIN, "--data", folder / "images", "--tokenizer", folder / "tokenizer"]


def tokenizer(folder: Path, out: str, *more: object) -> int:
    return call("tokenizer", *tokenizer_options(folder), "--out", folder / out, *more)


def pretrain(folder: Path, out: str, *more: object) -> int:
    return call("pretrain", *pretrain_options(folder), "--out", folder / out, *more)


def finetune(folder: Path, out: str, *more: object, weights: str = "pretrain") -> int:
    return call(
        "finetune", *OPTIONS, "--data", folder / "data", "--weights", folder / weights, "--out", folder / out, *more
    )


def slug(options: str) -> str:
    """A name for a run with these options."""
    return re.sub(r"\W+", "_", options)


def log(run_folder: Path) -> str:
    return (run_folder / "log.txt").read_text()


def assert_resumes(command, runs: Path, out: str, *more: object) -> None:
    with deterministic():
        assert command(runs, out, *more) == 0
        assert_resumes_to_the_same_bits(lambda resumed: command(runs, resumed.name, *more), runs / out)
    assert f"1 x {HERE}" in log(runs / f"{out}_resumed")


@pytest.mark.parametrize(
    "options",
    ["", "--precision bf16", "--views 1", "--checkpointing --decay 0.5", "--batch-size 2 --accumulate 2"],
    ids=lambda o: o or "plain",
)
def test_a_tokenizer_s_training_resumes_to_the_same_bits(runs, options):
    name = f"tokenizer_{slug(options)}"
    assert_resumes(tokenizer, runs, name, "--dead-after", 0.5, *options.split())
    weights = last_weights(runs / f"{name}")
    assert weights["quantize.steps"] == 6 and weights["quantize.initialized"]


@pytest.mark.parametrize(
    "options",
    ["", "--precision bf16", "--masks device --mask random", "--masks device --no-shared-head", "--workers 1",
     "--batch-size 2 --accumulate 2", "--checkpointing --position relative", "--aggregation-depth 0"],
    ids=lambda o: o or "plain",
)  # fmt: skip
def test_a_pre_training_resumes_to_the_same_bits(runs, options):
    assert_resumes(pretrain, runs, f"pretrain_{slug(options)}", *options.split())


@pytest.mark.parametrize("options", ["", "--precision bf16 --weights tokenizer"], ids=lambda o: o or "plain")
def test_a_fine_tuning_resumes_to_the_same_bits_of_weights_and_average(runs, options):
    given = [runs / o if o == "tokenizer" else o for o in options.split()]
    name = f"tuned{len(options)}"
    assert_resumes(finetune, runs, name, "--ema-decay", 0.9, *given)
    results = json.loads((runs / f"{name}" / "results.json").read_text())
    assert results["weights"]["images"] == 9 and 0 <= results["average"]["top1"] <= 1


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "finetune"])
def test_it_trains_as_on_the_cpu(runs, stage):
    command, options = {
        "tokenizer": (tokenizer, ["--dead-after", 0]),
        "pretrain": (pretrain, ["--drop-path", 0]),
        "finetune": (finetune, "--drop-path 0 --augment-ops 0 --erasing 0 --mixup 0 --cutmix 0".split()),
    }[stage]
    found = []
    for device in (HERE, "cpu"):
        out = f"{stage}_on_{device}" + ("_dry" if DRY and not found else "")
        assert command(runs, out, *options, "--log-every", 1, "--device", device) == 0
        found.append(losses(runs / out))
    assert len(found[0]) == 6 and found[0] == pytest.approx(found[1], rel=1e-3)


def test_masks_drawn_on_the_device_train_as_the_loader_s(runs):
    for masks in ("loader", "device"):
        with deterministic():
            assert pretrain(runs, f"masks_{masks}", "--masks", masks, "--log-every", 1) == 0
    assert losses(runs / "masks_loader") == pytest.approx(losses(runs / "masks_device"), rel=1e-6)


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_a_compiled_training_has_the_losses_of_the_eager_one(runs, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    command, plain = {"tokenizer": (tokenizer, []), "pretrain": (pretrain, ["--drop-path", 0])}[stage]
    for out, options in (("eager", plain), ("compiled", [*plain, "--compile"])):
        assert command(runs, f"{stage}_{out}", "--log-every", 1, *options) == 0
    assert losses(runs / f"{stage}_eager") == pytest.approx(losses(runs / f"{stage}_compiled"), rel=1e-3)


@cuda_only
@pytest.mark.parametrize(
    ("stage", "options"),
    [("tokenizer", "--views 0 --dead-after 0.5"), ("tokenizer", "--views 1 --precision bf16"), ("pretrain", ""),
     ("pretrain", "--precision bf16 --masks device"), ("pretrain", "--drop-path 0 --compile")],
)  # fmt: skip
def test_a_captured_training_ends_as_the_eager_one(runs, stage, options, monkeypatch):
    """Twelve steps, of which eight are replays and the 7th and 10th are bad. A graph launches the same kernels, but
    cuBLAS may choose others, and the learning rate is rounded to fp32: a difference of 1e-6, which AdamW makes one of a
    whole step where a gradient is noise. A rate or a batch that a replay did not get would change all by 1e-1."""
    spoil(monkeypatch, (7, 10))
    command = {"tokenizer": tokenizer, "pretrain": pretrain}[stage]
    common = ["--epochs", 4, "--log-every", 1, *options.split()]
    names = [f"{stage}_{kind}_{slug(options)}" for kind in ("eager", "captured")]
    with deterministic():
        assert command(runs, names[0], *common) == 0
        assert command(runs, names[1], *common, "--cuda-graph") == 0
    assert "CUDA graph" in log(runs / names[1]) and "step 10 skipped: the loss is nan" in log(runs / names[1])
    assert losses(runs / names[1]) == pytest.approx(losses(runs / names[0]), rel=1e-3)
    for file in ("model", "optimizer"):
        eager, captured = (last_weights(runs / name, file) for name in names)
        apart = {name: distance(captured[name], value) for name, value in eager.items()}
        assert {name: d for name, d in apart.items() if d > 2e-2} == {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_nan_is_skipped_and_named(runs, monkeypatch, precision):
    original, calls = pretrain_command.PretrainTask.loss, []

    def loss(self, model, batch):
        result, metrics = original(self, model, batch)
        calls.append(1)
        return (result * torch.nan if len(calls) == 2 else result), metrics

    monkeypatch.setattr(pretrain_command.PretrainTask, "loss", loss)
    assert pretrain(runs, f"nan_{precision}", "--precision", precision, "--log-every", 1) == 0
    assert "step 2 skipped: the loss is nan" in log(runs / f"nan_{precision}")
    assert len(losses(runs / f"nan_{precision}")) == 5
    assert all(value.isfinite().all() for value in last_weights(runs / f"nan_{precision}").values())


def test_only_nan_ends_the_training_and_leaves_the_batch_behind(runs, monkeypatch, capsys):
    original = pretrain_command.PretrainTask.loss
    monkeypatch.setattr(pretrain_command.PretrainTask, "loss", lambda *a: (original(*a)[0] * torch.nan, {}))
    assert pretrain(runs, "only_nan", "--stop-after-bad", 2) == 2
    assert "NaN or Inf in 2 steps in a row" in capsys.readouterr().err
    (file,) = (runs / "only_nan").glob("bad_batch_*.safetensors")
    assert load_file(file)["student"].shape == (4, 3, 32, 32)


def test_sigterm_ends_it_after_the_step_and_the_same_command_goes_on(runs):
    options = [*pretrain_options(runs), "--out", runs / "stopped", "--workers", 1]
    training = Halted("pretrain", 2, *options)
    os.kill(training.pid, signal.SIGTERM)
    assert training.go_on() == 128 + signal.SIGTERM, training.output
    step = 2 if DRY else 3  # the host knows of step 2 when step 3 has begun
    assert checkpoints(runs / "stopped") == [f"step_{step:08d}"]
    assert call("pretrain", *options) == 0
    assert f"resumed at step {step} of 6" in log(runs / "stopped")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encode_gives_the_cpu_s_codes(runs, tmp_path, precision):
    codes = []
    for device in (HERE, "cpu"):
        out = tmp_path / f"{len(codes)}.npz"
        config = EncodeConfig(
            runs / "tokenizer", out, batch_size=5, precision=precision, device=device, workers=len(codes)
        )
        assert encode_folder(runs / "images", config) == (12, [])
        codes.append(np.load(out)["codes"])
    assert (codes[0] == codes[1]).mean() > (0.99 if precision == "fp32" else 0.8)


@pytest.mark.parametrize("backbone", ["pretrain", "tokenizer", "finetuned", "untrained", "teacher"])
def test_a_probe_reads_the_features_that_the_cpu_does(runs, backbone):
    if backbone == "finetuned" and not (runs / backbone).exists():
        assert finetune(runs, backbone) == 0
    special = backbone in ("untrained", "teacher")
    common = "--preset demo --no-exact --workers 0 --seeds 2 --epochs 3 --shots 1 2".split()
    common += ["--backbone", backbone] if special else []
    common += [] if backbone == "teacher" else ["--layers", 1, 2]
    common += [
        "--run",
        runs / ("pretrain" if special else backbone),
        "--data",
        runs / "data",
        "--tokenizer",
        runs / "tokenizer",
    ]
    found = []
    for device in (HERE, "cpu"):
        out = runs / f"probe_{backbone}_{len(found)}"
        assert call("linear_probe", *common, "--device", device, "--out", out) == 0
        files = sorted((out / "features").glob("*.safetensors"))
        found.append([load_file(file)["features"] for file in files])
        rows = json.loads((out / "results.json").read_text())
        assert rows["rows"] and all(0 <= row["mean"] <= 1 for row in rows["rows"]) and rows["sweep"]
    assert len(found[0]) == (0 if backbone == "untrained" else 2)
    assert all(distance(*pair) < 1e-3 for pair in zip(*found, strict=True))


def test_an_exact_probe_compares_with_untrained_networks_pixels_and_the_teacher(runs):
    options = "--preset demo --workers 0 --seeds 2 --epochs 2 --shots 1 --exact --device".split()
    options += [HERE, "--run", runs / "pretrain", "--data", runs / "data", "--tokenizer", runs / "tokenizer"]
    assert call("linear_probe", *options, "--out", runs / "exact") == 0
    names = " ".join(row["features"] for row in json.loads((runs / "exact" / "results.json").read_text())["rows"])
    assert all(name in names for name in ("pre-trained", "untrained", "pixels", "teacher"))


def test_evaluate_repeats_the_numbers_of_the_training(runs):
    assert finetune(runs, "to_evaluate", "--ema-decay", 0.9) == 0
    before = json.loads((runs / "to_evaluate" / "results.json").read_text())
    assert finetune(runs, "to_evaluate", "--ema-decay", 0.9, "--evaluate") == 0
    again = json.loads((runs / "to_evaluate" / "results.json").read_text())
    for kind in ("weights", "average"):
        assert again[kind] == pytest.approx(before[kind], rel=1e-5)
    options = ["--model", runs / "to_evaluate", "--data", runs / "data" / "val", "--device", HERE, "--workers", 0]
    assert call("evaluate", *options, "--out", runs / "evaluated") == 0


@pytest.mark.parametrize("options", ["", "--precision bf16"], ids=lambda o: o or "plain")
def test_a_segmentation_trains_and_is_evaluated_at_several_scales(runs, options):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra: segment)")
    scenes = runs / "scenes"
    if not scenes.exists():
        write_scenes(scenes / "train", 8)
        write_scenes(scenes / "val", 3, 1)
    small = [*SMALL, "--device", HERE, "--loader", "torchvision", "--epochs", 1, "--data", scenes]
    out = runs / f"segmented{len(options)}"
    command = [*small, "--weights", runs / "pretrain", "--out", out, *options.split()]
    assert call("segment", *command) == 0
    before = json.loads((out / "results.json").read_text())
    assert call("segment", *command, "--evaluate", "--multi-scale") == 0
    again = json.loads((out / "results.json").read_text())
    assert again["weights"]["miou"] == pytest.approx(before["weights"]["miou"], abs=1e-3)
    assert {"weights", "multi_scale"} <= set(again) and list((out / "overlays").glob("*.png"))


def test_a_tokenizer_s_quality_is_measured(runs):
    options = ["--run", runs / "tokenizer", "--data", runs / "images", "--device", HERE, "--out", runs / "quality"]
    assert call("tokenizer_quality", *options) == 0
    found = json.loads((runs / "quality" / "results.json").read_text())
    assert found["images"] == 12 and 0 < found["used_codes"] <= 1


def test_a_report_is_drawn(runs):
    from beitv2_fast.train import report

    options = ["--tokenizer", runs / "tokenizer", "--pretrain", runs / "pretrain", "--data", runs / "data"]
    options += ["--probe", runs / "none", "--device", HERE, "--out", runs / "report"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")
    report.main([str(option) for option in options])
    assert (runs / "report" / "report.html").is_file()


@pytest.mark.parametrize("loader", ["gpu", "dali", "torchvision"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_loader_feeds_a_training(runs, loader, workers):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra: dali)")
    out = f"{loader}_{workers}"
    assert pretrain(runs, out, "--loader", loader, "--no-in-memory", "--workers", workers) == 0
    assert f"loaded by {loader} on the {HERE}" in log(runs / out)
    assert all(np.isfinite(losses(runs / out)))


def test_the_deepspeed_launcher_trains_and_resumes(runs):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    environment = {"DS_ACCELERATOR": "cpu" if DRY else "cuda"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    options = [*pretrain_options(runs), "--precision", "bf16", "--out", runs / "zero"]
    options += ["--deepspeed-config", ROOT / "train" / "configs" / "base_one_node.json"]
    whole = run("pretrain", *options, launcher=launcher, **environment)
    assert whole.returncode == 0, whole.stderr[-3000:]
    shutil.rmtree(runs / "zero" / "checkpoints" / checkpoints(runs / "zero")[-1])
    again = run("pretrain", *options, launcher=launcher, **environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step 3 of 6" in log(runs / "zero") and "DeepSpeed ZeRO" in log(runs / "zero")


@cuda_only
def test_bf16_is_the_precision_of_a_gpu(runs):
    assert pretrain(runs, "auto", "--precision", "auto", "--epochs", 1) == 0
    assert "bf16 autocast" in log(runs / "auto")
