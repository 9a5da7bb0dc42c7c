"""Tests of what optional packages bring are skipped where these are missing: none fails, and all can be collected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FILES = "test_docs or test_stored_loading or test_result_tables or test_segmentation_evaluation"  # of what is collected
PLUGINS = "-p tests.support.without_extras -p no:cacheprovider -p no:benchmark".split()


def test_without_the_optional_packages_tests_are_skipped_with_a_reason_and_none_fails():
    command = [sys.executable, "-m", "pytest", *PLUGINS, "-m", "not faults", "-rs", "-k", FILES]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    for package in ("efficientnet_lite_pytorch", "matplotlib", "timm", "torchmetrics", "transformers"):
        assert re.search(rf"SKIPPED .*\b{package}\b", done.stdout), package


WITHOUT_PIL = """
import importlib, sys
sys.modules["PIL"] = sys.modules["matplotlib"] = None
from beitv2_fast import cli, errors
for start in (*(lambda name=name: importlib.import_module("beitv2_fast.train." + name) for name in sys.argv[1:]),
              lambda: cli.run_command("picture tokens run -o a.png".split())):
    try:
        start()
    except errors.UserError as error:
        assert "pip install 'beitv2-fast[" in str(error)
    else:
        raise AssertionError("it does not need Pillow")
"""


def test_every_command_that_reads_images_names_the_extra_that_brings_their_reader():
    train = Path(__file__).resolve().parents[1] / "train"
    scripts = [file.stem for file in train.glob("*.py") if "run_main(main)" in file.read_text(encoding="utf-8")]
    assert len(scripts) > 7
    done = subprocess.run([sys.executable, "-c", WITHOUT_PIL, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
