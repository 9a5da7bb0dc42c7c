"""Each op's folder has the same files, and what they promise to hold is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from beitv2_fast import kernels

ROOT = Path(kernels.__file__).parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/reference.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_registrations_are_in_ops_and_launches_in_triton(folder):
    files = {path.name for path in folder.iterdir()}
    assert files >= {"__init__.py", "ops.py", "reference.py"}
    assert files & {"cpu.cpp", "triton.py"}
    assert ("triton.py" in files) == any(name.startswith("triton_") for name in files)
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    assert {name for name, text in texts.items() if re.search(r"\bcustom_op\(|torch\.library\.", text)} == {"ops.py"}
    assert {name for name, text in texts.items() if re.search(r"\w\[.*\]\($", text, re.M)} <= {"triton.py"}


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "cpu.cpp").exists()], ids=lambda folder: folder.name)
def test_the_map_at_the_top_of_cpu_cpp_names_every_file(folder):
    head = (folder / "cpu.cpp").read_text(encoding="utf-8").partition("#include")[0]
    assert [path.name for path in folder.glob("cpu_*") if not re.search(rf"\b{path.stem}\.", head)] == []


def test_what_is_registered_has_a_name():
    assert [path for path in ROOT.rglob("*.py") if re.search(r"^def _\(", path.read_text(encoding="utf-8"), re.M)] == []
