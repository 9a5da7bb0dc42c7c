"""Eight processes start on many images, are killed while they check them and while they train, and lose nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from beitv2_fast.data import check

from ..support.downstream import write_colors
from ..support.training import TINY, TORCHRUN, Halted, assert_same_bits, run
from .test_ranks import ranks_of

pytestmark = pytest.mark.faults
RANKS, IMAGES, STEPS = 8, 50_000, 25
EIGHT = [*TORCHRUN[:-1], str(RANKS)]
SMALL = "--dim 16 --no-in-memory --weights none --epochs 1 --warmup-epochs 0 --ema-decay 0 --save-every 10"


@pytest.fixture
def images(tmp_path) -> Iterator[Path]:
    """50,000 PNG files, most of them names of the same ones."""
    folder = tmp_path / "images"
    write_colors(folder, 40)
    files = sorted(folder.rglob("*.png"))
    for i in range(IMAGES - len(files)):
        os.link(files[i % len(files)], files[i % len(files)].with_name(f"more_{i:05d}.png"))
    return folder


def test_eight_ranks_killed_in_the_check_and_in_a_step_end_with_the_bits_of_undisturbed_ones(images, tmp_path):
    options = [*TINY, *SMALL.split(), "--workers", 1, "--data", images, "--batch-size", IMAGES // RANKS // STEPS]
    cache, command = tmp_path / "run" / "images.jsonl", [*options, "--out", tmp_path / "run"]

    checking = Halted("finetune", "check", *command, launcher=EIGHT)
    os.kill(ranks_of(checking.pid)[3], signal.SIGKILL)
    assert checking.go_on() != 0  # returns when the last process has ended
    known = len(check._read_cache(cache, images))
    assert known == 3 * RANKS * check.IMAGES_PER_ROUND < IMAGES

    training = Halted("finetune", 20, *command, launcher=EIGHT)
    lines = cache.read_text().splitlines()
    assert len(lines) == 1 + IMAGES == 1 + len(check._read_cache(cache, images))  # none was looked at twice
    os.kill(ranks_of(training.pid)[5], signal.SIGKILL)
    assert training.go_on() != 0

    again = run("finetune", *command, launcher=EIGHT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resumed at step 10 of {STEPS}" in again.stdout
    assert cache.read_text().splitlines() == lines
    whole = run("finetune", *options, "--check", "none", "--out", tmp_path / "whole", launcher=EIGHT)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
