"""Steps of an experiment: order, what is run again, what a failure or a stop leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beitv2_fast.errors import UserError
from beitv2_fast.train.experiments.runner import Step, is_done, read_record, run_steps, times

SAYS = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write(sys.argv[2])"


def says(name: str, file: Path, *needs: str, code: int = 0, text: str | None = None) -> Step:
    """A step that appends its name to a file."""
    script = f"{SAYS}; sys.exit({code})"
    return Step(name, (sys.executable, "-S", "-c", script, str(file), text or name), needs)


def quiet(*_: object) -> None:
    return


def test_steps_run_after_what_they_need_and_are_not_run_again(tmp_path):
    file = tmp_path / "said"
    steps = [says("a", file), says("b", file, "a"), says("c", file, "b"), says("folder/d", file, "a", "c", text="d")]
    assert run_steps(steps, tmp_path, jobs=4, say=quiet).code == 0
    assert file.read_text() == "abcd"
    assert run_steps(steps, tmp_path, jobs=1, say=quiet).done == ["a", "b", "c", "folder/d"]
    assert file.read_text() == "abcd"
    assert (tmp_path / "logs" / "folder" / "d.txt").is_file()


def test_a_step_with_another_command_is_run_again(tmp_path):
    file = tmp_path / "said"
    run_steps([says("a", file)], tmp_path, say=quiet)
    changed = says("a", file, text="A")
    assert not is_done(tmp_path, changed)
    run_steps([changed], tmp_path, say=quiet)
    assert file.read_text() == "aA"
    assert len(read_record(tmp_path, changed)["attempts"]) == 2  # the time of both counts


def test_a_failed_step_takes_those_with_it_that_need_it_and_is_tried_again(tmp_path):
    file, said = tmp_path / "said", []
    steps = [says("a", file, code=3), says("b", file, "a"), says("c", file, "b"), says("d", file)]
    outcome = run_steps(steps, tmp_path, jobs=1, say=said.append)
    assert (outcome.done, outcome.failed, outcome.left, outcome.code) == (["d"], ["a"], ["b", "c"], 1)
    assert any("a failed with code 3" in line for line in said)
    run_steps(steps, tmp_path, jobs=1, say=quiet)
    assert file.read_text() == "ada"


def test_steps_run_beside_each_other_but_never_more_than_jobs(tmp_path):
    """Two steps that each wait for the other end; a third is not started before one of them has ended."""
    for name in ("one", "two"):
        os.mkfifo(tmp_path / name)
    write, read = "open('{}', 'w').write('x')", "open('{}').read()"
    first = f"{write.format(tmp_path / 'one')}; {read.format(tmp_path / 'two')}"
    second = f"{read.format(tmp_path / 'one')}; {write.format(tmp_path / 'two')}"
    steps = [Step(name, (sys.executable, "-S", "-c", code)) for name, code in (("a", first), ("b", second))]
    said = []
    assert run_steps([*steps, says("c", tmp_path / "said")], tmp_path, jobs=2, say=said.append).code == 0
    assert said[:2] == ["[0/3] a", "[0/3] b"] and said[2] in ("[1/3] c", "[2/3] c")


def test_each_step_gets_its_share_of_the_cores_as_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    file = tmp_path / "threads"
    code = f"import os; open({str(file)!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    run_steps([Step("a", (sys.executable, "-S", "-c", code))], tmp_path, jobs=2, say=quiet)
    assert file.read_text() == "3"


# The first step asks for the stop itself, once it can be told to save; the second must never start.
RUNS = """
import sys
from pathlib import Path
from beitv2_fast.train.experiments.runner import Step, run_steps
script = "trap 'echo saved; exit 143' TERM; kill -{0} $PPID; tail -f /dev/null & wait"
steps = [Step("long", ("bash", "-c", script)), Step("never", ("true",), ("long",))]
outcome = run_steps(steps, Path(sys.argv[1]), jobs=1)
print("left", outcome.left, "code", outcome.code, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_running_steps_save_and_starts_no_other(tmp_path, number):
    command = [sys.executable, "-c", RUNS.format(number.value), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"left ['never'] code {128 + number}" in found.stdout
    assert (tmp_path / "logs" / "long.txt").read_text() == "saved\n"
    assert read_record(tmp_path, Step("long", ()))["done"] is False


def test_the_processor_time_of_a_step_and_of_its_children_is_counted(tmp_path):
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    step = Step(
        "a",
        (sys.executable, "-S", "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {burn!r}])"),
    )
    run_steps([step], tmp_path, say=quiet)
    seconds, cpu = times(tmp_path, [step])
    assert cpu >= 0.3 and seconds > 0


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([Step("a", ("true",), ("b",)), Step("b", ("true",))], "the step a needs b before it"),
        ([Step("a", ("true",)), Step("a", ("false",))], "the step a is there twice"),
    ],
)
def test_a_list_that_cannot_run_is_refused(tmp_path, steps, said):
    with pytest.raises(UserError, match=said):
        run_steps(steps, tmp_path, say=quiet)
