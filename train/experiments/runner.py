"""Runs the commands of an experiment: several at once, finished ones never again, each resumed where it stopped.

An experiment is a list of ``Step``s in the order of their importance. What is known of a step lies in
``ROOT/steps/NAME.json`` (its command, whether it is done, seconds and processor seconds of every attempt), what it
printed in ``ROOT/logs/NAME.txt``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beitv2_fast.errors import UserError
from beitv2_fast.runs.files import write_atomically
from beitv2_fast.training.monitor import StopSignal

POLL = 0.2  # seconds between two looks at the running steps
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Step:
    """A command. name: unique, may have slashes. needs: the steps that must be done before it can start."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    started: float


@dataclass
class Outcome:
    """done, failed and left: names of steps; ``code``: of a shell, 128 + the signal's number after one."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    code: int = 0


def record_file(root: Path, name: str) -> Path:
    return root / "steps" / f"{name}.json"


def read_record(root: Path, step: Step) -> dict[str, Any]:
    """What is known of a step; of another command under its name, nothing but the time that it took."""
    try:
        found = json.loads(record_file(root, step.name).read_text())
        attempts = list(found["attempts"])
        return found if found["command"] == list(step.command) else _new(step, attempts)
    except (OSError, ValueError, KeyError, TypeError):
        return _new(step, [])


def is_done(root: Path, step: Step) -> bool:
    return read_record(root, step)["done"] is True


def times(root: Path, steps: Sequence[Step]) -> tuple[float, float]:
    """Seconds and processor seconds of all attempts of these steps."""
    attempts = [attempt for step in steps for attempt in read_record(root, step)["attempts"]]
    return tuple(sum(attempt[key] for attempt in attempts) for key in ("seconds", "cpu_seconds"))


def machine() -> dict[str, Any]:
    """The state of the machine, to be kept beside times that were measured on it."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "load_average": [round(x, 2) for x in os.getloadavg()],  # of 1, 5 and 15 minutes: 2 keep two cores busy
    }


def run_steps(steps: Sequence[Step], root: Path, *, jobs: int = 0, say: Callable[[str], None] = print) -> Outcome:
    """Run all steps that are not done, the first ones first, ``jobs`` at once (0: as many as there are cores).

    Each gets its share of the cores as threads: on small networks one thread for each of two steps does more than two
    threads for one. After SIGTERM or SIGINT the steps are told to stop and waited for; the same call goes on later. A
    step that fails takes those with it that need it, not the others.

    Raises:
        UserError: a step needs one that is not there, or two have one name.
    """
    _check(steps)
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or cores
    environment = {THREADS: str(max(cores // jobs, 1)), **os.environ}
    done = {step.name for step in steps if is_done(root, step)}
    waiting = [step for step in steps if step.name not in done]
    failed: set[str] = set()
    running: list[_Running] = []
    if done:
        say(f"{len(done)} of {len(steps)} steps are done already")
    told = False
    with StopSignal() as stop:
        while running or (waiting and stop.received is None):
            if stop.received is None:
                for step in _ready(waiting, done)[: jobs - len(running)]:
                    waiting.remove(step)
                    say(f"[{len(done)}/{len(steps)}] {step.name}")
                    running.append(_start(step, root, environment))
            elif not told:
                told = True
                say("stopping: the running steps save first")
                for one in running:
                    _stop(one)
            if not running:
                break  # what waits needs something that failed
            time.sleep(POLL)
            for one in list(running):
                code = _finished(one, root)
                if code is None:
                    continue
                running.remove(one)
                (done if code == 0 else failed).add(one.step.name)
                if code and stop.received is None:
                    say(f"{one.step.name} failed with code {code}:\n{_tail(root, one.step.name)}")
    for name in sorted(failed):
        say(f"failed: {name}; see {root / 'logs' / name}.txt. The same command tries again.")
    left = [step.name for step in waiting]
    code = 128 + stop.received if stop.received is not None else int(bool(failed or left))
    return Outcome(sorted(done), sorted(failed), left, code)


def _check(steps: Sequence[Step]) -> None:
    known: set[str] = set()
    for step in steps:
        missing = [name for name in step.needs if name not in known]
        if step.name in known or missing:
            problem = f"needs {', '.join(missing)} before it" if missing else "is there twice"
            raise UserError(f"the step {step.name} {problem}: give every step once, after those that it needs.")
        known.add(step.name)


def _ready(waiting: Sequence[Step], done: set[str]) -> list[Step]:
    return [step for step in waiting if done.issuperset(step.needs)]


def _start(step: Step, root: Path, environment: dict[str, str]) -> _Running:
    log = root / "logs" / f"{step.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        # A group of its own: a stop reaches launchers and workers too, and Ctrl-C reaches them once, from here.
        process = subprocess.Popen(
            step.command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return _Running(step, process, time.monotonic())


def _finished(one: _Running, root: Path) -> int | None:
    """The exit code of a step that has ended, which is then written down; None while it runs."""
    pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
    if not pid:
        return None
    code = one.process.returncode = os.waitstatus_to_exitcode(status)
    record = read_record(root, one.step)
    seconds, cpu = time.monotonic() - one.started, usage.ru_utime + usage.ru_stime
    record["attempts"].append({"code": code, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)})
    record["done"] = code == 0
    file = record_file(root, one.step.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(record, indent=1) + "\n")
    return code


def _stop(one: _Running) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGTERM)


def _tail(root: Path, name: str, lines: int = 12) -> str:
    text = (root / "logs" / f"{name}.txt").read_text(errors="replace").replace("\r", "\n")
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


def _new(step: Step, attempts: list[dict[str, float]]) -> dict[str, Any]:
    return {"name": step.name, "command": list(step.command), "done": False, "attempts": attempts}
