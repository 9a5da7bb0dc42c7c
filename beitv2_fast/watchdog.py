"""Ends a training that hangs, with a stack trace of every rank instead of silence.

A hang of one rank is a hang of all: the others wait for it in their next collective. So every rank watches itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

EXIT_HUNG = 75  # of sysexits.h: a temporary failure, worth another try
GRACE = 10.0  # seconds that the other ranks have to write their traces before this one's end lets a launcher kill them


class Watchdog:
    """Inside, ``progress`` has to be called every so many seconds.

    If it is not, every thread's stack goes to stderr and to hang_rank_R.txt in the folder, and the process ends with
    code 75. A process whose interpreter is blocked too (native code that holds its lock) is ended by faulthandler's own
    timer, a little later and with a trace on stderr alone. Time is that of the monotonic clock.
    """

    def __init__(self, folder: Path, rank: int, seconds: float):
        self.file, self.rank, self.seconds = folder / f"hang_rank_{rank}.txt", rank, seconds
        self.grace = min(GRACE, seconds)
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.progress()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """The training lives."""
        if not self.seconds:
            return
        self.last = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + 2 * self.grace, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        while not self._closed.wait(max(self.last + self.seconds - time.monotonic(), 0.01)):
            if time.monotonic() >= self.last + self.seconds:
                self._end()

    def _end(self) -> None:
        said = (
            f"rank {self.rank}: no step in {self.seconds:g} seconds, so this process ends with code {EXIT_HUNG}. The "
            "stacks below, and those of the other ranks, show what it waits for. The same command resumes from the "
            "last checkpoint; --hang-after changes the time.\n"
        )
        try:
            with self.file.open("w") as file:
                file.write(said)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            said += f"({self.file} could not be written: {error})\n"
        with contextlib.suppress(OSError):  # a console that is gone
            print(said, file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        time.sleep(self.grace)
        os._exit(EXIT_HUNG)
