"""What a process that forks owes to its children."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_from_the_collector() -> Iterator[None]:
    """No garbage of this process is collected in one that is forked meanwhile: a DALI pipeline waits in its destructor
    for threads that a fork does not take along, for ever."""
    gc.collect()
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:  # whoever froze objects before wants them to stay so
            gc.unfreeze()
