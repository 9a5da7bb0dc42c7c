"""Every training is served by `--loader gpu`, says so, and resumes with the same bits."""

from __future__ import annotations

import shutil

import pytest

from beitv2_fast.training import images

from ..support.downstream import results, write_colors
from ..support.training import PRETRAIN, TINY, TOKENIZER, assert_same_bits, call, checkpoints

pytestmark = pytest.mark.slow
COMMON = [*TINY, "--epochs", 2, "--loader", "gpu"]


def test_every_training_is_served_and_a_resumed_one_ends_with_the_same_bits(tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        write_colors(data / split, 4)
    common = [*COMMON, "--data", data]
    assert call("tokenizer", *common, *TOKENIZER, "--views", 1, "--out", tmp_path / "tokenizer") == 0
    pretrain = [*common, *PRETRAIN, "--color-jitter", 0.4, "--tokenizer", tmp_path / "tokenizer"]
    assert call("pretrain", *pretrain, "--out", tmp_path / "pretrain") == 0
    assert call("finetune", *common, "--augment-ops", 0, "--weights", "none", "--out", tmp_path / "finetune") == 0
    for run in ("tokenizer", "pretrain", "finetune"):
        assert "loaded by gpu on the cpu (as asked for)" in (tmp_path / run / "log.txt").read_text()
    shutil.copytree(tmp_path / "pretrain", tmp_path / "resumed")
    saved = checkpoints(tmp_path / "resumed")
    assert len(saved) == 2
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / saved[-1])
    assert call("pretrain", *pretrain, "--out", tmp_path / "resumed") == 0
    assert_same_bits(tmp_path / "pretrain", tmp_path / "resumed")
    assert results(tmp_path / "finetune")["weights"]["images"] == 4 * len(list((data / "val").iterdir()))


def test_random_augmentation_is_refused_before_an_image_is_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "check_images", lambda *_, **__: pytest.fail("the images are checked"))
    write_colors(tmp_path / "train", 1)
    options = [*COMMON, "--data", tmp_path, "--augment-ops", 2, "--weights", "none", "--out", tmp_path / "run"]
    assert call("finetune", *options) == 2
    error = capsys.readouterr().err
    assert "--loader gpu: RandAugment is done by PIL (--augment-ops 0 leaves it out)" in error
