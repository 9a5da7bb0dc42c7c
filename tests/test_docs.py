"""The Python examples of docs/quantizer.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantizer.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_page_run(code):
    for package in re.findall(r"^from (vector_quantize_pytorch|diffusers) import", code, re.MULTILINE):
        pytest.importorskip(package)
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 7
