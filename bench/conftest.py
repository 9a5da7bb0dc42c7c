"""Prints the tables of ``harness.measure`` when the run ends."""

from __future__ import annotations

from typing import Any

from bench import harness


def pytest_terminal_summary(terminalreporter: Any) -> None:
    harness.report(terminalreporter.write_line)
