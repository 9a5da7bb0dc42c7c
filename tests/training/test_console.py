"""A console that is gone (a reader that ended, a closed terminal) never ends a command, and nobody else is blamed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from beitv2_fast.data.torch_loader import deaths_explained
from beitv2_fast.errors import DataError
from beitv2_fast.training.monitor import StopSignal, stopping_signals

from ..support.small_runs import small_runs
from ..support.training import ENVIRONMENT, ROOT, TINY, TOKENIZER, Halted, call, checkpoints, write_images

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "beitv2_fast"]


@pytest.fixture(autouse=True)
def without_nohup() -> Iterator[None]:
    """Whoever started the tests may have been told to outlive hangups, which processes inherit."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list:
    images = write_images(tmp_path_factory.mktemp("console") / "images")
    return [*TINY, *TOKENIZER, "--views", 1, "--log-every", 1, "--workers", 2, "--data", images]


def log(run: Path) -> str:
    return (run / "log.txt").read_text()


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, None])
def test_a_run_whose_console_is_gone_goes_on_or_saves_when_it_is_asked_to_stop(options, tmp_path, capsys, number):
    run = tmp_path / "run"
    training = Halted("tokenizer", 2, *options, "--out", run)
    training.process.stdout.close()  # of both its stdout and its stderr nobody is left to read
    if number is not None:
        os.killpg(training.pid, number)  # the data workers get it too
    training.process.stdin.write("\n")
    training.process.stdin.close()
    code = training.process.wait(timeout=120)
    training.watchdog.cancel()
    assert "loaded images died" not in log(run)
    if number is None:
        assert code == 0 and "tokenizer: done" in log(run)
        return
    assert code == 128 + number and "stopped at step 2, saved; the same command resumes" in log(run)
    assert checkpoints(run) == ["step_00000002"]
    assert call("tokenizer", *options, "--out", run) == 0
    assert "resumed at step 2 of 9" in capsys.readouterr().out


def test_ctrl_c_behind_tee_saves(options, tmp_path):
    run = tmp_path / "run"
    tee = ["bash", "-c", f'"$@" 2>&1 | tee {tmp_path}/tee.txt', "bash", sys.executable]
    training = Halted("tokenizer", 3, *options, "--out", run, launcher=tee)
    os.killpg(training.pid, signal.SIGINT)  # as a terminal does: tee is gone before the step ends
    training.go_on()
    deadline = time.monotonic() + 120
    while "stopped at step 3, saved" not in log(run):
        assert time.monotonic() < deadline, log(run)
        os.sched_yield()
    assert checkpoints(run) == ["step_00000003"]
    assert "step 2/9" in (tmp_path / "tee.txt").read_text()


def test_progress_bars_and_warnings_of_other_commands_need_no_console(tmp_path):
    root = small_runs(tmp_path)
    (root / "data" / "junk.png").write_text("junk")  # a warning in the end
    command = ["encode", root / "data", "--tokenizer", root / "tokenizer", "--out", root / "codes.npz"]
    with os.fdopen(closed_pipe(), "wb") as gone:
        done = subprocess.run(
            [*COMMAND, *map(str, command), "--device", "cpu", "--workers", "0"], stdout=gone, stderr=gone, timeout=120,
            env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 0 and len(np.load(root / "codes.npz")["codes"]) == 12


def test_a_log_without_a_terminal_has_no_progress_bars(options, tmp_path, capsys):
    assert call("tokenizer", *options, "--out", tmp_path / "run") == 0
    said = capsys.readouterr()
    assert "step 9/9" in said.out and said.err == ""
    for file in (*(ROOT / "beitv2_fast").rglob("*.py"), *(ROOT / "train").rglob("*.py")):  # nor those of other commands
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
                (disable,) = [ast.unparse(option.value) for option in node.keywords if option.arg == "disable"] or [""]
                assert "None" in disable or disable == "hidden", f"{file}: {ast.unparse(node)}"


def test_exit_codes_are_those_with_a_console():
    with os.fdopen(closed_pipe(), "wb") as gone:
        assert subprocess.run([*COMMAND, "models"], stdout=gone, env=ENVIRONMENT, cwd=ROOT).returncode == 0
    closed = ["bash", "-c", '"$@" >&- 2>&-', "bash", *COMMAND, "encode", "no such folder"]
    assert subprocess.run(closed, env=ENVIRONMENT, cwd=ROOT).returncode == 2


def test_a_hangup_stops_nothing_under_nohup():
    assert signal.SIGHUP in stopping_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    with StopSignal():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_only_a_connection_to_a_loading_process_that_breaks_is_its_death():
    with pytest.raises(BrokenPipeError), deaths_explained():
        raise BrokenPipeError
    with pytest.raises(DataError, match="A process that loaded images died"), deaths_explained(fetching=True):
        raise ConnectionResetError
    with pytest.raises(DataError, match="A process that loaded images died"), deaths_explained():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
