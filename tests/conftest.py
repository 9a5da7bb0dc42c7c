"""Fixtures that every test may ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .support.golden import SMALL
from .support.gpu import device_is_there, exact_products

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product; see gpu.deterministic


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not device_is_there():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device (BEITV2_FAST_GPU_TESTS=cpu: a dry run)"))


@pytest.fixture(autouse=True)
def gpu_tests_are_repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tests marked ``gpu`` draw the same numbers every time, and their fp32 is not TF32."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch.manual_seed(0)
    with exact_products():
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Mask statistics, learning rates and parameter groups of the reference implementation."""
    return json.loads((SMALL / "masks_and_schedules.json").read_text(encoding="utf-8"))
