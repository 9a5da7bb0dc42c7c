"""What a process that forks owes to its children, and work that is shared by some."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ..distributed import own_cores
from ..errors import DataError

T = TypeVar("T")
R = TypeVar("R")
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


def processes_for(images: int) -> int:
    """How many processes shall decode or hash so many images; 0: the calling one. Threads would not help: of files that
    take less than a millisecond, they spend as long on waiting for Python's lock."""
    return min(own_cores(), images // 1000)


def by_processes(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """``work`` on each task, in the tasks' order, by forked processes, which have all that it holds; 0: by this one.

    Raises:
        DataError: a process died. What ``work`` raises is raised here.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_process, (work,))
    try:
        with kept_from_the_collector():  # the processes start here
            results = pool.map(_work, tasks)
        yield from results
    except BrokenProcessPool as error:
        raise DataError(
            "A process that read images died (out of memory, or a file that crashes the decoder). Run again with "
            "fewer workers; if it happens again, look for a damaged file."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work_of_this_process: Callable


def _start_process(work: Callable) -> None:
    """Ctrl-C reaches every process of the group; one message, from the parent, is enough.

    The pool's processes would wait for work for ever if the parent were killed: they leave when it is gone.
    """
    global _work_of_this_process
    _work_of_this_process = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    return _work_of_this_process(task)
