"""torch.compile with gradient accumulation: half a minute of compiling."""

from __future__ import annotations

import json

import pytest

from ..support.training import TINY, TOKENIZER, call, write_images

pytestmark = pytest.mark.faults
LOSS = 1e-5  # compiled sums add in another order


def test_a_compiled_tokenizer_training_that_accumulates_has_the_losses_of_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # what lies elsewhere may be stale
    options = [*TINY, *TOKENIZER, "--data", write_images(tmp_path / "images"), "--epochs", 2, "--log-every", 1]
    options += ["--batch-size", 2, "--accumulate", 2]
    assert call("tokenizer", *options, "--out", tmp_path / "plain") == 0
    assert call("tokenizer", *options, "--compile", "--out", tmp_path / "compiled_run") == 0
    plain, compiled = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled_run")
    )
    assert len(plain) == 6
    assert compiled == pytest.approx(plain, rel=LOSS)
