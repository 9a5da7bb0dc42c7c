"""The loader without DALI: PIL in torch's worker processes, which may be killed, stopped or signaled at any time."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .draws import Key
from .forks import kept_from_the_collector
from .images import ImageFolder

PATIENCE = 30.0  # seconds for a batch that nobody wants any more, before the workers are ended; storage may hang


class TorchLoader(DataLoader):
    """A DataLoader whose workers outlive a SIGTERM to the process group, so that the trainer can end its step and save.

    While a step works on one batch, a thread fetches the next, as torch itself does where it pins memory: a batch comes
    through a connection for each of its tensors, which the worker serves between two batches' Python, not at once.

    It passes on what a DataError said, without the worker's traceback around it, and a worker that dies is a DataError.

    Args:
        dataset: ``dataset.__getitems__(keys)`` is a batch.
        batches: the keys of each batch, a list of lists or a Sampler.
        workers: processes; 0: the calling one.
    """

    def __init__(self, dataset: Any, batches: Any, workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            # Without its own, starting to iterate would draw from torch's global generator, and a resumed run start
            # twice.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # torch promises a class of its own
        with deaths_explained(fetching=True):
            try:
                # The workers inherit both from their first moment on.
                with _sigterm_blocked(), kept_from_the_collector() if self.num_workers else nullcontext():
                    batches = super().__iter__()
                yield from _one_ahead(batches) if self.num_workers and not self.pin_memory else batches
            except DataError as error:
                raise DataError(str(error).rpartition("DataError: ")[2]) from None


class FinishingLoader:
    """Batches that workers cut and ``dataset.device`` finishes: there it jitters, converts and normalizes.

    The pictures travel as uint8, an eighth of what two float32 views of the same size take.
    """

    def __init__(self, dataset: ImageFolder, batches: Any, workers: int) -> None:
        self.dataset, self.cuts = dataset, TorchLoader(_Cuts(dataset), batches, workers)

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        device, view = self.dataset.device, self.dataset.view
        cuts: Iterator[Any] = iter(self.cuts)
        for *cut, names in cuts:
            there = ({name: part.to(device, non_blocking=True) for name, part in parts.items()} for parts in cut)
            yield {**view.finish(*there), **names}


class _Cuts(Dataset):
    """``_Cuts(dataset).__getitems__(keys)``: the pictures, the draws and the names of a batch."""

    def __init__(self, dataset: ImageFolder) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> tuple[dict[str, Tensor], ...]:
        pictures, draws = self.dataset.cut(keys)
        drawn = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in draws.items()}
        return pictures, drawn, self.dataset.names(keys)


def _one_ahead(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    wanted: SimpleQueue[bool] = SimpleQueue()
    fetched: SimpleQueue[dict[str, Tensor] | BaseException | None] = SimpleQueue()

    def fetch() -> None:
        while wanted.get():
            try:
                fetched.put(next(batches, None))
            except BaseException as error:  # raised where the batch is waited for
                fetched.put(error)

    thread = threading.Thread(target=fetch, daemon=True, name="fetching batches")
    thread.start()

    def end() -> None:
        wanted.put(False)
        thread.join(PATIENCE)

    atexit.register(end)  # a thread that still fetches when the interpreter ends may abort the process
    try:
        wanted.put(True)
        while True:
            found = [fetched.get()]
            if isinstance(found[0], BaseException):
                raise found[0]
            if found[0] is None:
                return
            wanted.put(True)
            yield cast(dict[str, Tensor], found.pop())  # nothing here keeps the batch's memory
    finally:
        atexit.unregister(end)
        end()


@contextmanager
def deaths_explained(*, fetching: bool = False) -> Iterator[None]:
    """Inside, what torch and Python raise because a data-loading process was killed becomes a DataError.

    torch tells of it by an exception at whatever line the main thread is just then; Python by a broken connection, if a
    batch of that process's was still to be fetched from it: ``fetching``, since other connections break too.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _death(error) from error
    except (ConnectionError, EOFError) as error:
        if not fetching:
            raise
        with suppress(RuntimeError):
            time.sleep(1)  # until torch notices the death, too, which would raise at any line from here on
        raise _death(error) from error


def _death(error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"A process that loaded images died ({reason}). Often the memory was full: use fewer --workers. The same "
        "command goes on from what was saved last; if it happens again, look for a damaged file."
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Hold SIGTERM back in this thread; one that arrives meanwhile is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker_id: int) -> None:
    # Ctrl-C, the SIGHUP of a terminal that is closed, and SIGTERM from a launcher or scheduler reach every process of
    # the group, while the trainer still needs its batches to end the step and save. Only the trainer ends its workers;
    # if it dies, they notice and leave.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)  # the parent's threads and the other workers need the cores


def _end_when_told_by(parent: int) -> None:
    """Obey SIGTERM, which this process blocks, only from the parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
