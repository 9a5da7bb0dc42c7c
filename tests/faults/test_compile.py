"""torch.compile of whole trainings: minutes of compiling."""

from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.utils import counters

from ..support.small_runs import small_tokenizer
from ..support.training import PRETRAIN, TINY, TOKENIZER, call, losses, write_images

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


def test_a_pre_training_compiles_student_and_tokenizer_once_each_in_one_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    options = [*TINY, "--data", write_images(tmp_path / "images"), "--epochs", 2, "--log-every", 1]
    options += [*PRETRAIN, "--tokenizer", small_tokenizer(tmp_path / "tokenizer")]
    options += ["--drop-path", 0]  # compiled code draws otherwise
    assert call("pretrain", *options, "--out", tmp_path / "plain") == 0
    torch.compiler.reset()
    counters.clear()
    assert call("pretrain", *options, "--compile", "--out", tmp_path / "compiled_run") == 0
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert losses(tmp_path / "compiled_run") == pytest.approx(losses(tmp_path / "plain"), rel=LOSS)
