"""A small disk that fills while a checkpoint is written, and one that has become read-only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.training import TINY, TOKENIZER, TORCHRUN, assert_same_bits, call, checkpoints, run, write_images

pytestmark = pytest.mark.faults


def mount(*options: object) -> bool:
    return subprocess.run(["mount", *map(str, options)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder):
        pytest.skip("a tmpfs cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("undisturbed")
    options = [*TINY, *TOKENIZER, "--data", write_images(folder / "images")]
    assert call("tokenizer", *options, "--out", folder / "run") == 0
    return folder / "run", options


def to_step_6(whole: Path, other: Path) -> Path:
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints" / "step_00000009")
    return other


def test_a_full_disk_leaves_the_checkpoint_before_and_room_lets_it_go_on(undisturbed, disk, capsys):
    whole, options = undisturbed
    folder = to_step_6(whole, disk / "run")
    room = shutil.disk_usage(disk).free
    (disk / "other").write_bytes(b"x" * (room - 500_000))  # a checkpoint takes 750 kB
    assert call("tokenizer", *options, "--out", folder) == 2
    said = capsys.readouterr().err
    assert "the checkpoint of step 9 could not be written" in said and "make room" in said and "Traceback" not in said
    assert checkpoints(folder)[-1] == "step_00000006"
    (disk / "other").unlink()
    assert call("tokenizer", *options, "--out", folder) == 0
    assert "resumed at step 6 of 9" in capsys.readouterr().out
    assert_same_bits(folder, whole)


def test_two_ranks_both_end_on_a_full_disk_and_room_lets_them_go_on(undisturbed, disk, tmp_path):
    _, options = undisturbed
    # One process with two micro-batches has the bits of two ranks with one each.
    assert call("tokenizer", *options, "--batch-size", 2, "--accumulate", 2, "--out", tmp_path / "run") == 0
    folder = to_step_6(tmp_path / "run", disk / "run")
    (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free - 500_000))
    given = ["tokenizer", *options, "--batch-size", 2, "--out", folder]
    ended = run(*given, launcher=TORCHRUN)  # returns when the last process has ended
    assert ended.returncode != 0
    assert "the checkpoint of step 9 could not be written: " in ended.stderr and "make room" in ended.stderr
    assert "could not be written: see rank 0" in ended.stderr  # the other rank's words
    assert checkpoints(folder)[-1] == "step_00000006"
    (disk / "other").unlink()
    again = run(*given, launcher=TORCHRUN)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step 6 of 9" in again.stdout
    assert_same_bits(folder, tmp_path / "run")


def test_a_read_only_run_folder_is_told_and_nothing_in_it_changes(undisturbed, disk, capsys):
    whole, options = undisturbed
    folder = to_step_6(whole, disk / "run")
    assert mount("-o", "remount,ro", disk)
    assert call("tokenizer", *options, "--out", folder) == 2
    said = capsys.readouterr().err
    assert f"cannot write the run folder {folder}" in said and "Read-only" in said and "Traceback" not in said
    assert mount("-o", "remount,rw", disk)
    assert call("tokenizer", *options, "--out", folder) == 0
    assert_same_bits(folder, whole)
