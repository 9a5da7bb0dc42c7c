"""Fixtures that every test may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the repository, with reference data; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (reference data) is not here")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> dict[str, Any]:
    """Mask statistics, learning rates and parameter groups of the reference implementation."""
    return json.loads((shared / "golden" / "masks_and_schedules.json").read_text(encoding="utf-8"))
