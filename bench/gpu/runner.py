"""Runs sections in a process that may be lost: one that hangs, crashes or loses the GPU is replaced for the next.

The parent imports no torch and touches no GPU. A worker is asked for one section after another; its results come as
lines of JSON, which are printed and appended to the results' file as they come.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from bench.gpu.plan import Section, limit_of, reason_to_skip

MARK = "\x02"  # begins a line of results: whatever else a library prints is no result
WORKER = (sys.executable, "-m", "bench.gpu.worker")
START_SECONDS = 120  # for a new worker to import torch
OVERRUN = 15.0  # seconds after its limit in which a section may end what it is at
GRACE = 5.0  # seconds between asking a worker to end and killing it
FOLDERS = (sys.prefix, Path(__file__).resolve().parents[2])  # which results do not name


class Lost(Exception):
    """The worker ended, or had to be ended, in the middle of a section."""


class Worker:
    """A child process that runs sections; what is no result of its output goes to the log."""

    def __init__(self, log: TextIO, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*WORKER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            errors="replace", cwd=Path(__file__).resolve().parents[2], start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, section: Section, seconds: float) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"section": section.name, "seconds": seconds}) + "\n")
            self.process.stdin.flush()

    def next_line(self, until: float) -> str:
        """Raises Lost when the process ended or nothing came in time."""
        try:
            line = self.lines.get(timeout=max(until - time.monotonic(), 0.0))
        except queue.Empty:
            raise Lost("it did not end in its time") from None
        if line is None:
            raise Lost(f"its process ended with code {self.process.wait()}")
        return line

    def end(self) -> None:
        """End it and all that it started; a section's own children are in its group."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)


class Results:
    """The file of results and the terminal."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        # Without a buffer each line is one write, which those of other programs do not cut.
        self.out, self.about, self.started = file.open("ab", buffering=0), about, time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        for folder in FOLDERS:
            line = line.replace(f"{folder}/", "")
        self.out.write(f"{line}\n".encode())
        print(short(record), flush=True)

    def say(self, section: str, what: str, **values: Any) -> None:
        self.write({"section": section, "what": what, **values})


def short(record: dict[str, Any], most: int = 240) -> str:
    """A result as a person reads it while it runs; the file has all of it."""
    left = {k: v for k, v in record.items() if k not in ("section", "what", "at_s") and v is not None}
    values = " ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in left.items())
    text = f"{record['section']}: {record['what']}  {values}".replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def run_sections(
    sections: Sequence[Section], results: Results, log: TextIO, *, minutes: float, tiny: bool, data: Path | None
) -> list[str]:
    """Run them in order, for ``minutes``; the names of the sections that were lost."""
    end = time.monotonic() + 60 * minutes
    arguments = [*(["--tiny"] if tiny else []), *(["--data", str(data)] if data else [])]
    results.say("run", "plan", minutes=minutes, sections=[s.name for s in sections], **results.about)
    worker: Worker | None = None
    lost = []
    try:
        for section in sections:
            left = end - time.monotonic()
            if reason := reason_to_skip(left, tiny):
                results.say(section.name, "section", skipped=reason)
                continue
            started = time.monotonic()
            try:
                worker = worker or _start(log, arguments, results)
                limit = limit_of(section, end - time.monotonic(), tiny)
                worker.ask(section, limit)
                fresh = _follow(worker, results, log, time.monotonic() + limit + OVERRUN)
                if not fresh:
                    worker.end()
                    worker = None
            except Lost as reason:
                lost.append(section.name)
                results.say(section.name, "section", error=f"lost: {reason}", seconds=_since(started))
                if worker is not None:
                    worker.end()
                worker = None
    finally:
        if worker is not None:
            worker.end()
    results.say("run", "end", seconds=_since(results.started), lost=lost)
    return lost


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def _start(log: TextIO, arguments: Sequence[str], results: Results) -> Worker:
    """A worker that has said what machine it is on."""
    worker = Worker(log, arguments)
    try:
        _follow(worker, results, log, time.monotonic() + START_SECONDS)
    except Lost:
        worker.end()
        raise
    return worker


def _follow(worker: Worker, results: Results, log: TextIO, until: float) -> bool:
    """Pass on results until the section's end; whether the worker can run another one."""
    while True:
        line = worker.next_line(until)
        if not line.startswith(MARK):
            log.write(line)
            log.flush()
            continue
        found = json.loads(line[1:])
        results.write(found)
        if found["what"] in ("section", "machine"):
            return not found.get("replace", False)
