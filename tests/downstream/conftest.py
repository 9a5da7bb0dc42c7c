"""What the trainings here start from, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.training import PRETRAIN, TINY, TOKENIZER, call, write_images


@pytest.fixture(scope="package")
def starts(tmp_path_factory) -> Path:
    """A folder of images, and runs of one epoch on them: tokenizer and pretrain."""
    folder = tmp_path_factory.mktemp("starts")
    common = [*TINY, "--epochs", 1, "--data", write_images(folder / "images", 8)]
    assert call("tokenizer", *common, *TOKENIZER, "--out", folder / "tokenizer") == 0
    options = [*PRETRAIN, "--layer-scale", 0.1, "--tokenizer", folder / "tokenizer", "--out", folder / "pretrain"]
    assert call("pretrain", *common, *options) == 0
    return folder
