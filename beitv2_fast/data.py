"""From an image folder to batches whose every pixel follows from (seed, epoch, index).

So a resumed run sees what the uninterrupted one would have seen, whatever the number of worker processes, and the
global batches do not depend on the number of ranks they are divided among.
"""

import hashlib
import logging
import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .image_check import check_images
from .images import DataError, Image, ImageList, find_images, open_image
from .transforms import IMAGENET_MEAN, IMAGENET_STD, EvalView, PretrainView, TokenizerView, View

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DataError",
    "EpochSampler",
    "EvalView",
    "ImageFolder",
    "ImageList",
    "PretrainView",
    "TokenizerView",
    "check_images",
    "eval_loader",
    "find_images",
    "keyed_loader",
    "steps_per_epoch",
    "train_loader",
]

Key = tuple[int, int]  # epoch, index

log = logging.getLogger(__name__)


class ImageFolder(Dataset):
    """The views of the images of a list.

    `folder[epoch, index]` is the dict of the view's tensors, with "index", "view" (the epoch, or its remainder) and, if
    the list has labels, "label" (ints).
    Randomness comes from (seed, epoch, index) alone.

    Args:
        images: the images, as `check_images` returned them.
        view: what to make of an image.
        seed: of the views' randomness.
        views: V > 0: only V different views of every image, `epoch % V`; 0: a new one in every epoch.
        in_memory: decode all images now and keep them, 1 byte (grey) or 3 a pixel, `decoded_bytes` in all. Worth it
            where decoding is the larger part of the work and the images fit; forked worker processes share them.

    Raises:
        DataError: a file that could be read before no longer can.
    """

    def __init__(
        self, images: ImageList, view: View, seed: int = 0, *, views: int = 0, in_memory: bool = False
    ) -> None:
        self.images = images
        self.view = view
        self.seed = seed
        self.views = views
        self._decoded = None
        if in_memory:
            with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter's lock
                self._decoded = list(pool.map(self._open, range(len(images))))
            log.info("%d decoded images take %.0f MB of memory", len(images), self.decoded_bytes / 1e6)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor | int]:
        epoch, index = key
        number = epoch % self.views if self.views else epoch
        image = self._open(index) if self._decoded is None else self._decoded[index]
        sample = self.view(image, random.Random(_hash(self.seed, number, index)))
        if self.images.labels is not None:
            sample["label"] = self.images.labels[index]
        return {**sample, "index": index, "view": number}

    @property
    def decoded_bytes(self) -> int:
        """The memory that the decoded images take; 0 unless `in_memory`."""
        return sum(image.width * image.height * len(image.getbands()) for image in self._decoded or [])

    def _open(self, index: int) -> Image.Image:
        path = self.images.root / self.images.paths[index]
        try:
            return open_image(path)
        except Exception as error:  # a decoder may raise anything at all on a damaged file
            raise DataError(
                f"The image {path} could be read when it was checked, but cannot be now ({error}). "
                "Put it back, or start again so that the images are checked anew."
            ) from error


class EpochSampler(Sampler[list[Key]]):
    """The batches of one rank for steps start_step .. total_steps - 1, as lists of (epoch, index).

    Each epoch is a permutation of all images from (seed, epoch). Its k-th global batch is perm[k*G : (k+1)*G] with
    G = batch_size * world_size, and rank r has the r-th slice of it. The rest of an epoch, fewer than G images, is not
    used.

    Args:
        length: the number of images.
        batch_size: images a rank and step.

    Raises:
        DataError: a global batch is larger than the data set.
        ValueError: a rank outside the world, or steps that run backwards.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        total_steps: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 .. {world_size - 1} for a world size of {world_size}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step is {start_step}; expected 0 .. {total_steps}, the total number of steps")
        self.length, self.seed = length, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch = steps_per_epoch(length, batch_size, world_size)

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        permutation_of = order = None
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != permutation_of:
                generator = torch.Generator().manual_seed(_hash(self.seed, epoch))
                permutation_of, order = epoch, torch.randperm(self.length, generator=generator)
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


def steps_per_epoch(length: int, batch_size: int, world_size: int = 1) -> int:
    """length // (batch_size * world_size), batch_size being a rank's; DataError if that is 0."""
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size is {batch_size} and world_size {world_size}; both must be at least 1")
    if batch_size * world_size > length:
        raise DataError(
            f"A batch of {batch_size * world_size} images ({batch_size} on each of {world_size} ranks) is larger than "
            f"the data set of {length}. Choose a smaller batch or add images."
        )
    return length // (batch_size * world_size)


def train_loader(
    dataset: ImageFolder,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
) -> DataLoader:
    """Yields this rank's batches for steps start_step .. total_steps - 1 (see `EpochSampler`), then ends.

    A batch is a dict of stacked tensors: those of the view [batch_size, ...], "index", "view" and "label" int64
    [batch_size].
    `workers` processes prepare them (0: the calling one does); their number changes no pixel.

    Raises:
        DataError: a global batch is larger than the data set; while iterating, an image has become unreadable.
    """
    sampler = EpochSampler(
        len(dataset),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        total_steps=total_steps,
    )
    return _Loader(dataset, batch_sampler=sampler, **_loader_options(workers))


def eval_loader(dataset: ImageFolder, batch_size: int, workers: int = 0) -> DataLoader:
    """Yields all images once, in the list's order and as epoch 0, in batches like those of `train_loader`; the last one
    may be smaller."""
    return keyed_loader(dataset, [(0, index) for index in range(len(dataset))], batch_size, workers)


def keyed_loader(dataset: ImageFolder, keys: list[Key], batch_size: int, workers: int = 0) -> DataLoader:
    """Yields `dataset[key]` for these keys (epoch, index) in their order, in batches; the last one may be smaller."""
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return _Loader(dataset, batch_sampler=batches, **_loader_options(workers))


class _Loader(DataLoader):
    """A DataLoader whose workers outlive a SIGTERM to the process group, so that the trainer can end its step and save.

    It also passes on what a DataError said, without the worker's traceback around it.
    """

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            with _sigterm_blocked():  # the workers inherit it from their first moment on
                batches = super().__iter__()
            yield from batches
        except DataError as error:
            raise DataError(str(error).rpartition("DataError: ")[2]) from None


def _loader_options(workers: int) -> dict:
    return {
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers else None,
        "persistent_workers": workers > 0,
        "worker_init_fn": _start_worker,
        "pin_memory": torch.cuda.is_available(),
        # Without its own, starting to iterate would draw from torch's global generator, and a resumed run start twice.
        "generator": torch.Generator(),
    }


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Hold SIGTERM back in this thread; one that arrives meanwhile is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker_id: int) -> None:
    # Ctrl-C, and SIGTERM from a launcher or scheduler, reach every process of the group, while the trainer still needs
    # its batches to end the step and save. Only the trainer ends its workers; if it dies, they notice and leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)  # the parent's threads and the other workers need the cores


def _end_when_told_by(parent: int) -> None:
    """Obey SIGTERM, which this process blocks, from the parent alone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _hash(*numbers: int) -> int:
    """63 bits that depend on all of the numbers, so that neighbouring seeds, epochs and indices share nothing."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
