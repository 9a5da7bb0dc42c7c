"""What is installed is complete; where the C++ ops are missing the installation says so, and the first use says why."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beitv2_fast.kernels import native
from beitv2_fast.kernels.native import LIBRARY, native_ops

ROOT = Path(__file__).resolve().parents[1]
BUILD = f"{shlex.quote(sys.executable)} setup.py build_ext --build-lib out"
WITHOUT_TORCH = (
    f'{shlex.quote(sys.executable)} -c \'import sys, runpy; sys.modules["torch"] = None; '
    'sys.argv[1:] = ["build_ext", "--build-lib", "out"]; runpy.run_path("setup.py", run_name="__main__")\''
)


def first_warning(folder: Path) -> str:
    """What the first use says where the ops are looked for in ``folder``."""
    native_ops.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FOLDER", folder)
        with pytest.warns(UserWarning, match="beitv2_fast: the C\\+\\+ ops") as warned:
            assert not native_ops()
    native_ops.cache_clear()
    (said,) = warned
    assert "10 to 100 times slower" in str(said.message) and "`pip install" in str(said.message)
    return str(said.message)


@pytest.fixture
def sources(tmp_path) -> Path:
    """setup.py and one small C++ source."""
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cpu.cpp").write_text("int answer() { return 42; }\n")
    return tmp_path


def build(sources: Path, command: str = BUILD, **environment: str) -> tuple[str, Path]:
    """Builds with the standard streams hidden, as by pip: what the terminal shows, and the folder of the library."""
    spawn = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]
    done = subprocess.run(
        [*spawn, "sh", "-c", f"{command} >hidden 2>&1"],
        cwd=sources,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (sources / "hidden").read_text()
    return done.stdout, sources / "out" / "beitv2_fast" / "kernels"


def test_all_of_the_package_is_installed_and_an_experiment_starts_from_there(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    folders = {ROOT / "beitv2_fast": "", ROOT / "kernels": "kernels", ROOT / "train": "train"}
    files = {Path(to, file.relative_to(folder)) for folder, to in folders.items() for file in folder.rglob("*.*")}
    compiled = (".cpp", ".h", ".so", ".txt", ".pyc", ".md")  # and what the C++ ops are compiled from
    installed = {file.relative_to(tmp_path / "beitv2_fast") for file in tmp_path.rglob("*.*")}
    assert installed == {file for file in files if file.suffix not in compiled}
    listing = [sys.executable, "-m", "beitv2_fast.train.experiments.ablate"]
    assert "codebook_size" in subprocess.run(listing, cwd=tmp_path, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("command", "compiler", "cause"),
    (
        (BUILD, "/nowhere/g++", "/nowhere/g++"),
        (BUILD, None, "cpu.cpp:1:2: error: #error broken"),
        (WITHOUT_TORCH, None, "torch could not be imported by the build"),
    ),
    ids=("no compiler", "a compiler's error", "no torch"),
)
def test_a_build_that_fails_says_why_on_the_terminal_and_at_the_first_use(sources, command, compiler, cause):
    (sources / "kernels" / "cpu.cpp").write_text("#error broken\n")
    stale = sources / "out" / "beitv2_fast" / "kernels" / LIBRARY
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    terminal, folder = build(sources, command, **({"CXX": compiler} if compiler else {}))
    assert "THE C++ OPS WERE NOT BUILT" in terminal and cause in terminal
    assert not stale.exists()
    said = first_warning(folder)
    assert "could not be compiled at installation" in said and cause in said


def test_a_build_that_succeeds_says_nothing_and_notes_its_torch(sources):
    terminal, folder = build(sources)
    assert terminal == ""
    assert (folder / LIBRARY).exists()
    assert (folder / LIBRARY).with_suffix(".txt").read_text() == f"compiled for torch {torch.__version__}"
    torch.ops.load_library(str(folder / LIBRARY))


def test_ops_for_another_torch_are_not_loaded(tmp_path):
    (tmp_path / LIBRARY).write_bytes(b"")
    (tmp_path / Path(LIBRARY).with_suffix(".txt")).write_text("compiled for torch 1.13.1+cu117")
    assert f"compiled for torch 1.13.1+cu117, and this is torch {torch.__version__}" in first_warning(tmp_path)


def test_ops_that_an_earlier_version_left_are_not_loaded(tmp_path):
    (tmp_path / "_cpu.cpython-36m-x86_64-linux-gnu.so").write_bytes(b"")
    assert "for one Python, as earlier versions did (_cpu.cpython-36m-x86_64-linux-gnu.so)" in first_warning(tmp_path)


@pytest.mark.parametrize("removed", (False, True))
def test_a_folder_that_was_not_installed_or_lost_its_ops_says_so(tmp_path, removed):
    if removed:
        (tmp_path / LIBRARY).with_suffix(".txt").write_text("compiled for torch 2.14.1")
    assert "are not here: this copy of the package was not installed by pip" in first_warning(tmp_path)
