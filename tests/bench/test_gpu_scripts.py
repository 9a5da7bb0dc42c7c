"""What travels to a GPU machine and what runs there: both scripts, dry, on the CPU and without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "bench" / "gpu"


def script(name: str, *arguments: object, **environment: object) -> subprocess.CompletedProcess:
    given = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
    environment = {**given, **{key: str(value) for key, value in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> Path:
    """What prepare.sh makes without a network: the C++ ops of this Python, and a few compiled kernels."""
    if not (ROOT / "kernels" / "_cpu.abi3.so").exists():
        pytest.skip("the C++ ops are not compiled here, and take minutes")
    out = tmp_path_factory.mktemp("carried") / "carried"
    done = script("prepare.sh", "--offline", "--tiny", "--python", sys.executable, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MiB of 64.0 MiB travel" in done.stdout
    return out


@pytest.mark.slow
def test_the_ops_and_the_compiled_kernels_are_packed(carried):
    library = carried / "_cpu.abi3.so"
    assert (carried / "_cpu.abi3.txt").read_text().startswith("compiled for torch")
    load = f"import torch; torch.ops.load_library('{library}'); print(torch.ops.beitv2_fast_cpu.codebook_search)"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True, timeout=120).returncode == 0
    with tarfile.open(carried / "triton.tar.xz") as cache:
        kernels = {Path(name).stem for name in cache.getnames() if name.endswith(".cubin")}
    assert {"screen", "resolve", "pack_codebook", "statistics_kernel", "normalize_rows", "linear_loss"} <= kernels
    assert {"attention_forward", "query_gradients", "key_gradients"} <= kernels


@pytest.mark.slow
def test_the_other_script_finds_them_there_and_writes_its_results(carried, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    done = script("run.sh", 9, "env", "masks", "--tiny", CARRIED=carried, WORK=work, OUT=out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["section"] for r in found if r["what"] == "section"] == ["env", "masks"]
    assert sorted(path.name for path in out.iterdir()) == ["results.jsonl", "results.log"]
    count = sum(1 for _ in (work / "triton").iterdir())
    assert count > 10 and f"kernels in Triton's cache: {count} carried" in done.stdout
    # Triton finds a kernel's files where this says that they are.
    for group in (work / "triton").glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"].values()
        assert paths and all(Path(path).parent.parent == work / "triton" and Path(path).exists() for path in paths)


def test_files_are_kept_for_later_calls_and_photographs_are_given_to_the_program(tmp_path):
    pack, python = tmp_path / "photographs.npz", tmp_path / "python"
    pack.write_bytes(b"packed")
    python.write_text('#!/bin/sh\necho "ran: $@"\n')
    python.chmod(0o755)
    there = {"WORK": tmp_path / "work", "OUT": tmp_path / "out", "CARRIED": tmp_path / "none", "PYTHON": python}
    assert script("run.sh", "keep", pack, **there).returncode == 0
    done = script("run.sh", "8.5", "learn", **there)
    kept = tmp_path / "work" / "kept" / pack.name
    assert kept.read_bytes() == b"packed"
    assert f"ran: -m bench.gpu learn --minutes 8.5 --out {tmp_path / 'out'} --data {kept}" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"), [("run.sh", []), ("run.sh", ["steps"]), ("run.sh", ["5"]), ("prepare.sh", ["--what"])]
)
def test_a_wrong_call_says_how_and_does_nothing(name, arguments, tmp_path):
    done = script(name, *arguments, WORK=tmp_path / "work", OUT=tmp_path / "out")
    assert done.returncode == 2
    assert "bash bench/gpu/run.sh" in done.stdout or "unknown option --what" in done.stderr


def test_the_scripts_name_no_machine_and_no_registry():
    for name in ("prepare.sh", "run.sh"):
        text = (SCRIPTS / name).read_text()
        assert not [word for word in ("http", "index-url", "/home/", "/work") if word in text]
        assert shutil.which("bash") and subprocess.run(["bash", "-n", str(SCRIPTS / name)]).returncode == 0
