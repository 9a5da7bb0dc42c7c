"""A request to stop that a training obeys between two steps, so that it can save first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


def stopping_signals() -> list[signal.Signals]:
    """What asks this process to stop: a hangup too, unless it was told to outlive that."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP ask for a stop after the current step; a second Ctrl-C is obeyed at once.

    A second SIGTERM is not: launchers pass on what their process group has already got, and would end the save. SIGHUP
    comes from a terminal that is closed; under ``nohup`` it stays without effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in stopping_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
