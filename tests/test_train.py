"""The training commands on a handful of real-sized files: they learn, resume to the same bits, and refuse bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--preset demo --image-size 32 --patch-size 8 --dim 24 --depth 2 --heads 2 --batch-size 4 --epochs 3 --workers 0 "
    "--device cpu --precision fp32 --log-every 2 --save-every 3 --warmup-epochs 1"
).split()
PRETRAIN = "--early-layer 1 --num-masked 6 --min-mask-patches 2 --drop-path 0.1".split()


def run(script: str, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train" / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    options = [*TINY, "--teacher-image-size", 128, "--num-codes", 16, "--code-dim", 8, "--decoder-depth", 1]
    result = run("tokenizer.py", *options, "--data", images, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def pretrain(images: Path, tokenizer: Path, out: Path, *more: object) -> subprocess.CompletedProcess:
    return run("pretrain.py", *TINY, *PRETRAIN, "--data", images, "--tokenizer", tokenizer, "--out", out, *more)


def test_a_run_that_lost_its_last_checkpoint_ends_with_the_same_bits(images, tokenizer, tmp_path):
    assert pretrain(images, tokenizer, tmp_path / "whole").returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    checkpoints = sorted((tmp_path / "resumed" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    resumed = pretrain(images, tokenizer, tmp_path / "resumed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 6 of 9" in resumed.stdout
    end = f"checkpoints/{checkpoints[-1].name}/model.safetensors"
    whole, again = load_file(tmp_path / "whole" / end), load_file(tmp_path / "resumed" / end)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_cut_checkpoint_falls_back_to_the_one_before(images, tokenizer, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    assert pretrain(images, tokenizer, tmp_path / "run").returncode == 0
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    result = pretrain(images, tokenizer, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "cannot be used" in result.stdout and "resumed at step 6 of 9" in result.stdout


def test_another_config_is_refused_and_nothing_changes(images, tokenizer):
    before = (tokenizer / "config.json").read_bytes()
    result = run("tokenizer.py", *TINY, "--data", images, "--out", tokenizer, "--lr", 0.5)
    assert result.returncode == 2
    assert "another config" in result.stderr and "Traceback" not in result.stderr
    assert (tokenizer / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--data", "missing_folder"], "does not exist"), (["--tokenizer", "missing_run"], "is no run folder")],
)
def test_bad_input_ends_with_one_paragraph_and_code_2(images, tokenizer, tmp_path, options, said):
    result = pretrain(images, tokenizer, tmp_path / "run", *options)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr
