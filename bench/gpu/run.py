"""What a section writes its results with, and how long it has: one JSON object a line, each flushed at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from beitv2_fast.errors import UserError
from bench.gpu import clocks
from bench.gpu.runner import MARK
from bench.harness import DEVICE, Unavailable

ROOT = Path(__file__).resolve().parents[2]
TAIL = 2000  # characters of what a command printed that a result keeps


class LostContext(Exception):
    """The GPU refuses all further work of this process: an illegal access, say."""


class SkippedItem(Exception):
    """pytest.skip of a benchmark that is used here, as an exception that is caught like others."""


@dataclass
class Run:
    """A section that is running. tiny: small sizes, no peers that compile for long. deadline: of time.monotonic()."""

    section: str
    tiny: bool
    deadline: float
    data: Path | None = None  # photographs to learn from
    tainted: bool = field(default=False, init=False)  # a capture failed: the next section gets a new process
    started: float = field(default_factory=time.monotonic, init=False)

    @property
    def on_gpu(self) -> bool:
        return DEVICE.type == "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def need_time(self, seconds: float = 0.0) -> None:
        """Raises Unavailable when no more than that is left of the section's time, for an ``item`` to write down."""
        if self.left() <= seconds:
            raise Unavailable("no time is left in this section")

    def say(self, what: str, **values: Any) -> None:
        at = round(time.monotonic() - self.started, 2)
        line = json.dumps({"section": self.section, "what": what, "at_s": at, **values}, default=str)
        sys.stdout.write(f"{MARK}{line}\n")
        sys.stdout.flush()

    @contextmanager
    def item(self, what: str, **values: Any) -> Iterator[None]:
        """One result of a section: what fails in it is written down and the section goes on.

        Raises:
            LostContext: the failure took the GPU with it.
        """
        try:
            with _pytest_skips():
                yield
        except (Unavailable, SkippedItem, ImportError, UserError) as reason:  # all of them: it cannot run here
            self.say(what, **values, skipped=str(reason)[:300])
        except Exception as error:
            self.say(what, **values, error=f"{type(error).__name__}: {str(error)[-400:]}")
        finally:
            self.tidy()

    def tidy(self) -> None:
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise LostContext(str(error)) from error

    def time(
        self, what: str, make: Callable[[], Callable[[], object]], *, flops: float = 0.0, moved: float = 0.0,
        seconds: float = 1.0, graph: bool = True, on_device: bool = True, **values: Any,
    ) -> None:  # fmt: skip
        """Time what ``make`` returns by every clock. flops and moved: FLOPs of a call, bytes it has to move."""
        with self.item(what, **values):
            self.need_time()
            call = make()
            started = time.perf_counter()
            call()
            clocks.wait()
            first = time.perf_counter() - started
            seconds = min(seconds, 0.02 if self.tiny else seconds)
            times = clocks.all_times(call, seconds=seconds, graph=graph, on_device=on_device)
            self.tainted |= times.graph_error is not None
            self.say(what, **values, first_s=round(first, 3), **times.numbers(flops, moved))

    def time_call(self, what: str, call: Callable[[], object], **options: Any) -> None:
        """``time`` of a call that needs no preparation."""
        self.time(what, lambda: call, **options)

    def command(
        self, what: str, command: Sequence[str], *, limit: float, env: dict[str, str] | None = None, **values: Any
    ) -> subprocess.CompletedProcess | None:
        """Run a command to its end or for ``limit`` seconds; its output goes to stderr, which the log keeps.

        None if it had to be ended, which is written down.
        """
        limit = max(min(limit, self.left() - 2), 1)
        started = time.monotonic()
        with tempfile.TemporaryFile() as file:  # a pipe might be held open by what the command has started
            # In the section's process group: whoever ends the section ends this, too.
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            ended = _wait(process, limit)
            file.seek(0)
            output = file.read().decode(errors="replace")
        sys.stderr.write(f"$ {' '.join(command)}\n{output}\n")
        if not ended:
            self.say(what, **values, error=f"ended after {limit:.0f} s", tail=output[-TAIL:])
            return None
        done = subprocess.CompletedProcess(list(command), process.returncode, output)
        done.seconds = time.monotonic() - started
        return done


def _wait(process: subprocess.Popen, limit: float) -> bool:
    """Whether it ended by itself; interrupted it has a few seconds to save, or to say which tests have failed."""
    for seconds, number in ((limit, signal.SIGINT), (8, signal.SIGKILL)):
        try:
            process.wait(seconds)
            return number == signal.SIGINT
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    process.wait()
    return False


@contextmanager
def _pytest_skips() -> Iterator[None]:
    """Benchmarks skip through pytest, whose exception is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "Skipped":
            raise SkippedItem(str(error)) from error
        raise
