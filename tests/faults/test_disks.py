"""A small disk that fills while a checkpoint is written, and one that has become read-only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..training import TINY, TOKENIZER, assert_same_bits, call, checkpoints, write_images

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


def to_step_6(run: Path, other: Path) -> Path:
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / "step_00000009")
    return other


def test_a_full_disk_leaves_the_checkpoint_before_and_room_lets_it_go_on(undisturbed, disk, capsys):
    whole, options = undisturbed
    run = to_step_6(whole, disk / "run")
    room = shutil.disk_usage(disk).free
    (disk / "other").write_bytes(b"x" * (room - 500_000))  # a checkpoint takes 750 kB
    assert call("tokenizer", *options, "--out", run) == 2
    said = capsys.readouterr().err
    assert "the checkpoint of step 9 could not be written" in said and "make room" in said and "Traceback" not in said
    assert checkpoints(run)[-1] == "step_00000006"
    (disk / "other").unlink()
    assert call("tokenizer", *options, "--out", run) == 0
    assert "resumed at step 6 of 9" in capsys.readouterr().out
    assert_same_bits(run, whole)


def test_a_read_only_run_folder_is_told_and_nothing_in_it_changes(undisturbed, disk, capsys):
    whole, options = undisturbed
    run = to_step_6(whole, disk / "run")
    assert mount("-o", "remount,ro", disk)
    assert call("tokenizer", *options, "--out", run) == 2
    said = capsys.readouterr().err
    assert f"cannot write the run folder {run}" in said and "Read-only" in said and "Traceback" not in said
    assert mount("-o", "remount,rw", disk)
    assert call("tokenizer", *options, "--out", run) == 0
    assert_same_bits(run, whole)
