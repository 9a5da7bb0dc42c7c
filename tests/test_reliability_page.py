"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def named() -> list[tuple[str, str]]:
    """(file, test) in the order of the page; a name without a file belongs to the file before it."""
    found, file = [], ""
    for given, test in re.findall(r"`([\w/]*\.py)?::(test_\w+)`", PAGE.read_text(encoding="utf-8")):
        file = given or file
        found.append((file, test))
    return found


def test_every_test_that_the_page_names_exists():
    assert len(named()) > 30
    missing = [f"{f}::{t}" for f, t in named() if f"def {t}(" not in (TESTS / f).read_text(encoding="utf-8")]
    assert missing == []


def test_every_fault_test_is_named_by_the_page():
    files = [TESTS / "test_faults.py", *(TESTS / "faults").glob("test_*.py")]
    tests = {test for file in files for test in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)}
    assert tests - {test for _, test in named()} == set()
