"""The training commands on a handful of real-sized files: they learn, resume to the same bits, and refuse bad input."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ..support.training import PRETRAIN, TINY, TOKENIZER, run, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tokenizer(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    result = run("tokenizer", *TINY, *TOKENIZER, "--data", images, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def pretrain(images: Path, tokenizer: Path, out: Path, *more: object) -> subprocess.CompletedProcess:
    return run("pretrain", *TINY, *PRETRAIN, "--data", images, "--tokenizer", tokenizer, "--out", out, *more)


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
    result = run("tokenizer", *TINY, "--data", images, "--out", tokenizer, "--lr", 0.5)
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
