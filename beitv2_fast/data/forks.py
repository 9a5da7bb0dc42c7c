"""What a process that forks owes to its children."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_open = 0  # how many kept_from_the_collector are entered


@contextmanager
def kept_from_the_collector() -> Iterator[None]:
    """No garbage of this process is collected in one that is forked meanwhile: a DALI pipeline waits in its destructor
    for threads that a fork does not take along, for ever."""
    global _open
    gc.collect()
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def _freeze() -> None:
    if _open:
        gc.freeze()


# In the child: in the parent, what others froze (Python 3.12 itself does) could not be told apart afterwards.
os.register_at_fork(after_in_child=_freeze)
