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
