"""A source distribution, the wheel made of it, and that wheel in an environment of its own: minutes of compiling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from ..support.training import PRETRAIN, ROOT, TINY, TOKENIZER, write_images

pytestmark = pytest.mark.faults
USE = """
import torch
from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.kernels.native import native_ops
assert native_ops()
print(FusedVectorQuantizer(16, 8)(torch.randn(40, 8)).indices.shape[0])
"""


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True, capture_output=True, timeout=1500)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made of the source distribution of the tracked files."""
    folder = tmp_path_factory.mktemp("build")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in tracked.rstrip("\0").split("\0"):
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    with tarfile.open(build("sdist", folder / "tree", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    assert not (source / "tests").exists() and list((source / "kernels").rglob("*.h"))
    return build("wheel", source, folder / "wheel")


def test_one_small_wheel_serves_every_python(wheel):
    assert "-cp310-abi3-" in wheel.name and wheel.stat().st_size < 2e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"beitv2_fast/kernels/_cpu.abi3.so", "beitv2_fast/train/pretrain.py", "beitv2_fast/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"beitv2_fast"}


def test_the_wheel_works_where_nothing_else_of_this_project_is(wheel, tmp_path):
    """torch and what else is installed here is seen through a path file; the package is not."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "here.pth").write_text(str(Path(torch.__file__).parents[1]))
    bin_folder, elsewhere = tmp_path / "env" / "bin", tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(bin_folder / str(command[0])), *map(str, command[1:])], cwd=elsewhere, env=env, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert str(packages) in run("python", "-c", "import beitv2_fast; print(beitv2_fast.__file__)")
    assert run("python", "-c", USE).strip() == "40"
    assert "encode" in run("beitv2-fast", "--help")
    common = [*TINY, "--data", write_images(tmp_path / "images"), "--epochs", 1]
    run("python", "-m", "beitv2_fast.train.tokenizer", *common, *TOKENIZER, "--out", "tokenizer")
    said = run(
        "python", "-m", "beitv2_fast.train.pretrain", *common, *PRETRAIN, "--tokenizer", "tokenizer", "--out", "run"
    )
    assert "pretrain: done" in said and "attention native" in said
