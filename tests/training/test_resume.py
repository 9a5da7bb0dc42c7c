"""In every stage a run that lost its last checkpoint repeats it to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..downstream.test_finetune import write_colors
from ..downstream.test_segment import SMALL, write_scenes
from ..support.training import (
    PRETRAIN,
    TINY,
    TOKENIZER,
    assert_resumes_to_the_same_bits,
    call,
    last_weights,
)

# nine steps of four images, a checkpoint after every third
STAGES = {
    "tokenizer": [*TINY, *TOKENIZER, "--dead-after", 0.5, "--views", 2],
    "pretrain": [*TINY, *PRETRAIN, "--layer-scale", 0.1, "--color-jitter", 0.4],
    "finetune": [*TINY, "--drop-path", 0.1, "--ema-decay", 0.9],
    "segment": [*SMALL, "--drop-path", 0.1],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Path]:
    """The whole run of a stage, made when first asked for; the options to go on with are those of ``go``."""
    root = tmp_path_factory.mktemp("stages")
    write_colors(root / "colors" / "train", 4)
    write_colors(root / "colors" / "val", 3)
    write_scenes(root / "scenes" / "train", 12)
    write_scenes(root / "scenes" / "val", 2, 1)

    def whole(stage: str) -> Path:
        if not (root / stage).exists():
            if stage != "tokenizer":
                whole("tokenizer" if stage == "pretrain" else "pretrain")
            assert go(stage, root / stage) == 0
        return root / stage

    return whole


def go(stage: str, out: Path) -> int:
    root = out.parent
    given = ["--data", root / ("scenes" if stage == "segment" else "colors"), "--out", out]
    start = {"tokenizer": [], "pretrain": ["--tokenizer", root / "tokenizer"]}
    return call(stage, *STAGES[stage], *given, *start.get(stage, ["--weights", root / "pretrain"]))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_lost_its_last_checkpoint_ends_with_the_same_bits(trained, stage):
    whole = trained(stage)
    assert_resumes_to_the_same_bits(lambda out: go(stage, out), whole)
    if stage == "finetune":
        average = last_weights(whole, "ema")
        assert any((average[name] != value).any() for name, value in last_weights(whole).items())
