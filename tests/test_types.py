"""What a type checker sees of the installed package: see PEP 561."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import beitv2_fast

# torch is passed over: reading its types takes four times as long as all the rest.
CONFIG = "[mypy]\nstrict = True\n[mypy-torch.*,numpy.*,PIL.*]\nfollow_imports = skip\n"
RIGHT = f"""
from beitv2_fast import {", ".join(beitv2_fast.__all__)}

quantizer = FusedVectorQuantizer(num_codes=16, dim=8, metric="euclidean", dead_after=0.0)
share: float = quantizer.usage()["used_codes"]
model: Tokenizer | Student | Classifier = create_model("beitv2_base", drop_path=0.1)
if isinstance(model, Student):
    layer: int = model.config.early_layer
names: list[str] = list_models()
"""
WRONG = {
    'FusedVectorQuantizer(num_codes="16", dim=8)': "arg-type",
    "ResidualVectorQuantizer(16, 8, 4, learning_rate=0.1)": "call-arg",
    "StudentConfig(early_layer=None)": "arg-type",
    "list_models().config": "attr-defined",
    "import beitv2_fast; beitv2_fast.Quantizer": "attr-defined",
}


def test_a_program_with_the_public_names_is_checked_against_the_installed_package(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(build, cwd=Path(__file__).parents[1], capture_output=True, check=True)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "program.py").write_text("\n".join([RIGHT, *WRONG]))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", os.devnull, "program.py"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}  # a folder of installed packages, to mypy as to Python
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300).stdout
    first = RIGHT.count("\n") + 2
    errors = [line for line in said.splitlines() if ": error: " in line]
    found = [(line.split(":")[1], line.rpartition("  [")[2].rstrip("]")) for line in errors]
    assert found == [(str(first + i), code) for i, code in enumerate(WRONG.values())], said
