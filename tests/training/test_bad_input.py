"""What a person may get wrong on the command line ends with one paragraph that says what to do, and changes nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from beitv2_fast import errors
from beitv2_fast.config import presets
from beitv2_fast.config.downstream import ProbeConfig, SegmentConfig
from beitv2_fast.errors import UserError
from beitv2_fast.runs.folder import RunFolder
from beitv2_fast.teachers.base import Teacher

from ..support.training import PRETRAIN, TINY, TOKENIZER, call, write_images


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with images and the runs of both stages, one step long."""
    folder = tmp_path_factory.mktemp("world")
    write_images(folder / "images", 4)
    (folder / "empty").mkdir()
    (folder / "file").write_text("no image, no folder, no checkpoint")
    write_images(folder / "small", 4, size=5)
    for split in ("train", "test"):
        write_images(folder / "one_class" / split / "a", 2)
        write_images(folder / "labeled" / split / "a", 2)
        write_images(folder / "labeled" / split / "b", 2)
    shutil.copytree(folder / "labeled", folder / "unreadable_class")
    for path in (folder / "unreadable_class" / "train" / "b").iterdir():
        path.write_text("junk")
    options = [*TINY, "--epochs", 1, "--data", folder / "images"]
    assert call("tokenizer", *options, *TOKENIZER, "--out", folder / "tokenizer") == 0
    assert call("pretrain", *options, *PRETRAIN, "--tokenizer", folder / "tokenizer", "--out", folder / "pretrain") == 0
    for name, file in (("corrupt_config", "config.json"), ("no_checkpoint", "checkpoints"), ("cut", "checkpoints")):
        shutil.copytree(folder / "tokenizer", folder / name)
        path = folder / name / file
        if name == "corrupt_config":
            path.write_text("{")
        elif name == "no_checkpoint":
            shutil.rmtree(path)
        else:
            weights = path / "step_00000001" / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:500])
    return folder


STAGES = {
    "tokenizer": [*TINY, *TOKENIZER, "--data", "images"],
    "pretrain": [*TINY, *PRETRAIN, "--data", "images", "--tokenizer", "tokenizer"],
    "linear_probe": "--preset demo --workers 0 --data labeled --run pretrain --tokenizer tokenizer".split(),
}
BOTH, ALL = ("tokenizer", "pretrain"), tuple(STAGES)
MISTAKES = [
    (BOTH, "--data empty", "holds no images"),
    (BOTH, "--data missing", "does not exist"),
    (BOTH, "--data file", "is a file, but a folder with images"),
    (BOTH, "--data small", "too small: 5x5 pixels, needed 8x8"),
    (BOTH, "--batch-size 64", "Choose a smaller batch or add images"),
    (BOTH, "--heads 5", "is not a multiple of heads"),
    (BOTH, "--patch-size 7", "is not a multiple of patch_size"),
    (BOTH, "--deepspeed-config missing.json", "--deepspeed-config missing.json cannot be read"),
    (ALL, "--out file", "is a file, but a run needs a folder"),
    (ALL, "--out file/run", "cannot write the run folder"),
    (ALL, "--out /proc/run", "cannot write the run folder"),  # root may write to any folder of a real disk
    (ALL, "--out images", "is no run folder"),
    (ALL, "--out corrupt_config", "corrupt_config/config.json cannot be read"),
    (ALL, "--batch-size 0", "--batch-size is 0, but must be at least 1"),
    (ALL, "--workers -1", "--workers is -1, but must be at least 0"),
    (BOTH, "--epochs 0", "--epochs is 0, but must be at least 1"),
    (BOTH, "--lr nan", "--lr is nan, but must be above 0"),
    (BOTH, "--warmup-epochs inf", "--warmup-epochs is inf"),
    (BOTH, "--betas 0.9 1", "--betas is 0.9 1.0, but must be at least 0 and below 1"),
    (BOTH, "--crop-scale 2 1", "--crop-scale is 2.0 1.0"),
    (BOTH, "--crop-scale 0.9 0.1", "first number must not be above its second"),
    (("tokenizer",), "--teacher-weights missing.pth", "there is no checkpoint file missing.pth"),
    (("tokenizer",), "--teacher-weights file", "file cannot be read as a checkpoint"),
    (("tokenizer",), "--teacher-weights tokenizer/checkpoints/step_00000001/model.safetensors", "does not fit"),
    (("pretrain",), "--num-masked 100", "num_masked is 100; a grid of 4x4 has 0 .. 16"),
    (("pretrain",), "--early-layer 9", "early_layer must lie in 1..2"),
    (("pretrain",), "--image-size 64", "Choose --image-size and --patch-size so that both have the same grid"),
    (("pretrain",), "--tokenizer missing", "missing is no run folder"),
    (("pretrain",), "--tokenizer images", "images is no run folder"),
    (("pretrain",), "--tokenizer pretrain", "holds a student, not a tokenizer"),
    (("pretrain",), "--tokenizer corrupt_config", "corrupt_config/config.json cannot be read"),
    (("pretrain",), "--tokenizer no_checkpoint", "has no checkpoint yet"),
    (("pretrain",), "--tokenizer cut", "cannot be read as a checkpoint"),
    (("linear_probe",), "--run missing", "missing is no run folder"),
    (("linear_probe",), "--tokenizer missing", "missing is no run folder"),
    (("linear_probe",), "--tokenizer pretrain", "is a run folder of pretrain, but tokenizer's is needed"),
    (("linear_probe",), "--data missing", "needs the folders train/CLASS and test/CLASS"),
    (("linear_probe",), "--data images", "needs the folders train/CLASS and test/CLASS"),
    (("linear_probe",), "--data one_class", "needs at least two class folders"),
    (("linear_probe",), "--data unreadable_class", "no image of the classes b in"),
]


def contents(folder: Path) -> dict[str, int]:
    """Every file, with the time of its last change; a lock is no content."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    ("stage", "mistake", "said"), [(stage, *rest) for stages, *rest in MISTAKES for stage in stages]
)
def test_a_mistake_ends_with_one_paragraph_and_code_2(world, tmp_path, monkeypatch, capsys, stage, mistake, said):
    monkeypatch.chdir(world)
    before = contents(world)
    assert call(stage, *STAGES[stage], "--out", tmp_path / "run", *mistake.split()) == 2
    error = capsys.readouterr().err.rpartition("\nerror: ")[2]
    assert said in error
    assert "\n\n" not in error and "Traceback" not in error
    assert len(error) < (3000 if "does not fit" in error else 1200)  # which names every entry that does not
    assert contents(world) == before
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_files_are_listed_once_and_left_out(world, tmp_path, caplog, capsys):
    shutil.copytree(world / "images", tmp_path / "images")
    png = (world / "images" / "00.png").read_bytes()
    for name, content in {"cut.png": png[: len(png) // 2], "empty.png": b"", "text.png": b"no image"}.items():
        (tmp_path / "images" / name).write_bytes(content)
    Image.new("CMYK", (40, 40)).save(tmp_path / "images" / "cmyk.jpg")  # not RGB, but an image all the same
    options = [*TINY, *TOKENIZER, "--epochs", 1, "--data", tmp_path / "images", "--out", tmp_path / "run"]
    assert call("tokenizer", *options) == 0
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "3 of 8 files" in warning and all(name in warning for name in ("cut.png", "empty.png", "text.png"))
    assert "5 images" in capsys.readouterr().out
    assert call("tokenizer", *options) == 0
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [warning]


def test_a_failed_first_try_does_not_hold_the_folder_but_a_run_of_another_config_does(world, tmp_path, capsys):
    options = [*TINY, *TOKENIZER, "--epochs", 1, "--out", tmp_path / "run"]
    assert call("tokenizer", *options, "--data", world / "missing") == 2
    assert call("tokenizer", *options, "--data", world / "images", "--in-memory") == 0
    before = contents(tmp_path / "run")
    assert call("tokenizer", *options, "--data", world / "images", "--lr", 1) == 2
    assert "another config (lr: 0.001 there, 1.0 now)" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_run_folder_in_use_is_refused_and_free_again_when_its_process_ends(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from beitv2_fast.config.downstream import ProbeConfig\n"
        "from beitv2_fast.runs.folder import RunFolder\n"
        "run = RunFolder(ProbeConfig(out=pathlib.Path(sys.argv[1])))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    config = ProbeConfig(out=tmp_path / "run")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is writing"):
            RunFolder(config)
        other.kill()
    RunFolder(config)


def test_a_run_of_before_an_option_goes_on_with_its_default_only(tmp_path):
    config = SegmentConfig(out=tmp_path / "run")
    RunFolder(config)
    (config.out / "results.json").write_text("{}")
    file = config.out / "config.json"
    stored = json.loads(file.read_text())
    del stored["label_values"]
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"label_values: \[\] there"):
        RunFolder(dataclasses.replace(config, label_values=(0, 255)))
    RunFolder(config)


def test_a_teacher_whose_grid_does_not_fit_is_refused():
    class Coarse(Teacher):
        patch_size = 8

        def features(self, images):
            return images[..., ::16, ::16]

    with pytest.raises(UserError, match=r"gives a grid of \(2, 2\) features, the tokenizer has \(4, 4\) patches"):
        Coarse((0.5,) * 3, (0.5,) * 3)(torch.zeros(1, 3, 32, 32), (4, 4))


@pytest.mark.parametrize(
    ("package", "stage", "options", "extra"),
    [
        ("efficientnet_lite_pytorch", "tokenizer", [], "demo"),
        ("open_clip", "tokenizer", ["--teacher", "clip"], "teachers"),
        ("timm", "tokenizer", ["--teacher", "dino"], "teachers"),
        ("deepspeed", "pretrain", ["--deepspeed-config", "missing.json"], "deepspeed"),
        ("safetensors", "pretrain", [], "train"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    world, tmp_path, monkeypatch, capsys, package, stage, options, extra
):
    def without(name):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return importlib.__import__(name, fromlist=["_"])

    monkeypatch.setattr(errors.importlib, "import_module", without)
    monkeypatch.chdir(world)
    assert call(stage, *STAGES[stage], *options, "--out", tmp_path / "run") == 2
    assert f"pip install 'beitv2-fast[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "preset"),
    [
        ("tokenizer", presets.TOKENIZER["demo"]),
        ("pretrain", presets.PRETRAIN["demo"]),
        ("linear_probe", presets.PROBE["demo"]),
        ("finetune", presets.FINETUNE["demo"]),
        ("evaluate", presets.EVALUATE["demo"]),
    ],
)
def test_help_explains_every_option_and_shows_the_preset_s_values(capsys, stage, preset):
    config = type(preset)
    assert call(stage, "--preset", "demo", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(config):
        assert "--" + f.name.replace("_", "-") in text
        assert len(f.metadata["help"]) > 15 and " ".join(f.metadata["help"].split()) in text.replace("- ", "-")
    own = [value for name, value in vars(preset).items() if value != getattr(config(), name)]
    shown = [" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in own]
    assert shown and [value for value in shown if f"[{value}]" not in text] == []
