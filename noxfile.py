"""The rows of docs/compatibility.md: the test suite in environments of their own. Needs `pip install nox uv`.

    nox -l                                       # the rows
    nox -s torch2.11-py3.12                      # one of them: the C++ ops built and loaded, then the tests
    nox -s torch2.11-py3.12 -- -m "not slow"     # what follows -- goes to pytest
    nox -R -s torch2.11-py3.12 -- tests/kernels  # again in the same environment, with the ops as they were built

A row works on a copy of the tracked files, so that no two rows share a build, and ends with its line of the table.
"""

from __future__ import annotations

import datetime
import shlex
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

TORCH_2_14 = ("torch==2.14.*", "torchvision==0.29.*")
TORCH_2_11 = ("torch==2.11.*", "torchvision==0.26.*")
# name: Python, requirements beside the extras, extras, options of the installer
ROWS = {
    "torch2.14-py3.10": ("3.10", TORCH_2_14, "test", ()),
    "torch2.14-py3.11": ("3.11", TORCH_2_14, "test", ()),
    "torch2.14-py3.12": ("3.12", TORCH_2_14, "test", ()),
    "torch2.14-py3.13": ("3.13", TORCH_2_14, "test", ()),
    "torch2.11-py3.12": ("3.12", TORCH_2_11, "test", ()),
    "newest-py3.13": ("3.13", (), "test", ()),  # what pip installs today
    "lowest": ("3.10", (), "test", ("--resolution=lowest-direct",)),  # every requirement at its lower bound
    "bare": ("3.12", ("pytest", "hypothesis", *TORCH_2_14), "train", ()),  # no optional package, no ../shared
}
VERSIONS = """
import platform, torch, warnings
warnings.simplefilter("error")
from beitv2_fast.kernels.native import native_ops
assert native_ops()
try:
    from triton import __version__ as triton
except ImportError:
    triton = "none"
print(platform.python_version(), torch.__version__, triton, sep=" | ")
"""


def run_row(session: nox.Session, requirements: tuple[str, ...], extra: str, options: tuple[str, ...]) -> None:
    """Installs the row, builds and loads the C++ ops, runs the tests."""
    folder = Path(session.create_tmp()).resolve()
    copy = folder / "beitv2-fast"
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True).stdout
    for file in filter(Path.is_file, map(Path, tracked.rstrip("\0").split("\0"))):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy / file)
    shared = Path("..", "shared").resolve()
    if shared.is_dir() and session.name != "bare":
        (folder / "shared").unlink(missing_ok=True)
        (folder / "shared").symlink_to(shared)
    session.chdir(copy)
    session.env["PYTHONPATH"] = ""
    session.install("setuptools>=77", "wheel", "ninja")
    session.install("--requirements=setup.py", f"--extra={extra}", *options, *requirements)
    session.install("--no-deps", "--no-build-isolation", "--editable", ".")
    versions = session.run("python", "-c", VERSIONS, silent=True).strip().splitlines()[-1]
    results = folder / "tests.xml"
    session.run("python", "-m", "pytest", f"--junitxml={results}", *session.posargs, success_codes=[0, 1])
    suite = ElementTree.parse(results).getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - int(suite["skipped"]) - failed
    asked = shlex.join(["nox", "-s", session.name, *(["--", *session.posargs] if session.posargs else [])])
    today = datetime.date.today().isoformat()
    session.log(f"| {versions} | {passed:,} | {suite['skipped']} | {failed} | {today} | `{asked}` |")
    if failed:
        session.error(f"{failed} tests failed")


for name, (python, *row) in ROWS.items():
    nox.session(lambda session, row=row: run_row(session, *row), name=name, python=python, tags=["matrix"])
