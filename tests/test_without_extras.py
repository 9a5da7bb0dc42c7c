"""Tests of what optional packages bring are skipped where these are missing: none fails, and all can be collected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FILES = (
    "test_docs or test_model_options or test_result_tables or test_segmentation_evaluation"  # of all that is collected
)


def test_without_the_optional_packages_tests_are_skipped_with_a_reason_and_none_fails():
    options = [
        "-p",
        "tests.support.without_extras",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-m",
        "not faults",
        "-rs",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", FILES],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    for package in ("efficientnet_lite_pytorch", "matplotlib", "timm", "torchmetrics", "transformers"):
        assert re.search(rf"SKIPPED .*\b{package}\b", done.stdout), package
