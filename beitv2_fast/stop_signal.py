"""A request to stop that a training obeys between two steps, so that it can save first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; a second Ctrl-C is obeyed at once.

    A second SIGTERM is not: launchers pass on what their process group has already got, and would end the save.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
