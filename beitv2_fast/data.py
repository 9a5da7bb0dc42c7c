"""From images to batches whose every pixel follows from (seed, epoch, index), by DALI or by PIL with torch's workers.

So a resumed run sees what the uninterrupted one would have seen, whatever the number of workers, and the global batches
do not depend on the number of ranks they are divided among. Both loaders take the same crops, flips, colours and masks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .draws import Draws, image_keys
from .errors import UserError, require
from .image_check import check_images
from .images import DataError, Image, ImageList, find_images
from .sampler import EpochSampler, Key, rank_share
from .torch_loader import TorchLoader
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalView,
    FinetuneView,
    PretrainView,
    TokenizerView,
    View,
    pictures_of,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DataError",
    "EpochSampler",
    "EvalView",
    "FinetuneView",
    "ImageFolder",
    "ImageList",
    "PretrainView",
    "TokenizerView",
    "check_images",
    "choose_loader",
    "eval_loader",
    "find_images",
    "keyed_loader",
    "train_loader",
]

LOADERS = ("auto", "dali", "torchvision")

log = logging.getLogger(__name__)


class Loader(Protocol):
    """Batches in turn: dicts of tensors, those of the view [B, ...] and "index", "view" and "label" int64 [B]."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...


class ImageFolder(Dataset):
    """The views of the images of a list.

    `folder[epoch, index]` is the dict of the view's tensors, with "index", "view" (the epoch, or its remainder) and, if
    the list has labels, "label" (ints); `folder.__getitems__(keys)` is the same for a batch.
    Randomness comes from (seed, epoch, index) alone.

    Args:
        images: the images, as `check_images` returned them.
        view: what to make of an image.
        seed: of the views' randomness.
        views: V > 0: only V different views of every image, `epoch % V`; 0: a new one in every epoch.
        in_memory: decode all images now and keep them, 1 byte (grey) or 3 a pixel, `decoded_bytes` in all. Worth it
            where decoding is the larger part of the work and the images fit; forked worker processes share them.
        loader: what makes batches of them: "torchvision" (PIL and torch's workers) or "dali"; see `choose_loader`.
        device: where DALI works and leaves the batches; PIL works on the CPU, whatever it says.

    Raises:
        DataError: a file that could be read before no longer can.
    """

    def __init__(
        self,
        images: ImageList,
        view: View,
        seed: int = 0,
        *,
        views: int = 0,
        in_memory: bool = False,
        loader: str = "torchvision",
        device: torch.device | str = "cpu",
    ) -> None:
        self.images = images
        self.view = view
        self.seed = seed
        self.views = views
        self.loader, self.device = loader, torch.device(device if loader == "dali" else "cpu")
        self._decoded = None
        if in_memory:
            with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter's lock
                self._decoded = list(pool.map(self._open, range(len(images))))
            log.info("%d decoded images take %.0f MB of memory", len(images), self.decoded_bytes / 1e6)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Tensor | int]:
        return {n: v[0] if v[0].dim() else v[0].item() for n, v in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        images = [self._open(index) if self._decoded is None else self._decoded[index] for _, index in keys]
        draws = self.draws(keys, np.array([image.size for image in images]))
        return {**self.view.finish(pictures_of(images, self.view, draws), draws), **self.names(keys)}

    def draws(self, keys: list[Key], sizes: np.ndarray) -> Draws:
        """The view's random decisions for images of these sizes [B, 2] (width, height)."""
        numbers = np.array([self._number(epoch) for epoch, _ in keys])
        return self.view.draw(sizes, image_keys(self.seed, numbers, np.array([index for _, index in keys])))

    def names(self, keys: list[Key]) -> dict[str, Tensor]:
        """What says which images a batch holds: "index", "view" and, if there are labels, "label", int64 [B]."""
        indices = [index for _, index in keys]
        named = {"index": indices, "view": [self._number(epoch) for epoch, _ in keys]}
        if self.images.labels is not None:
            named["label"] = [self.images.labels[index] for index in indices]
        return {name: torch.tensor(values) for name, values in named.items()}

    def lost(self, index: int, error: Exception) -> DataError:
        """What to raise when an image can no longer be read."""
        return DataError(
            f"The image {self.images.root / self.images.paths[index]} could be read when it was checked, but cannot be "
            f"now ({error}). Put it back, or start again so that the images are checked anew."
        )

    @property
    def decoded_bytes(self) -> int:
        """The memory that the decoded images take; 0 unless `in_memory`."""
        return sum(image.width * image.height * len(image.getbands()) for image in self._decoded or [])

    def _number(self, epoch: int) -> int:
        return epoch % self.views if self.views else epoch

    def _open(self, index: int) -> Image.Image:
        try:
            return self.images.open(index)
        except Exception as error:  # a decoder may raise anything at all on a damaged file
            raise self.lost(index, error) from error


def choose_loader(wanted: str, *, in_memory: bool = False) -> tuple[str, str]:
    """-> ("dali" or "torchvision", why). `wanted` is one of those or "auto": DALI where it is installed, unless the
    images are decoded in memory, where it would have nothing to do.

    Raises:
        UserError: DALI is wanted and not installed, or wanted with images in memory.
    """
    if wanted == "torchvision":
        return wanted, "as asked for"
    if wanted == "dali" and in_memory:
        raise UserError(
            "--in-memory keeps decoded images, but DALI decodes them itself. Leave out --in-memory, or use --loader "
            "torchvision."
        )
    if in_memory:
        return "torchvision", "the images are decoded already"
    try:
        dali = require("nvidia.dali", "dali", "Loading with DALI")
    except UserError:
        if wanted == "dali":
            raise
        return "torchvision", "DALI is not installed"
    return "dali", f"DALI {dali.__version__}"


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
) -> Loader:
    """Yields this rank's batches for steps start_step .. total_steps - 1 (see `EpochSampler`), then ends.

    `workers` processes prepare them (0: the calling one does); with DALI on a GPU as many threads. Their number changes
    no pixel.

    Raises:
        DataError: a global batch is larger than the data set; while iterating: an image has become unreadable, a worker
            process died. Neither makes the loader wait for ever.
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
    return _loader(dataset, sampler, batch_size, workers)


def eval_loader(dataset: ImageFolder, batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1) -> Loader:
    """Yields all images once, in the list's order and as epoch 0, in batches like those of `train_loader`; the last one
    may be smaller. Of several ranks each sees the images rank, rank + world_size, ...: "index" says which."""
    return keyed_loader(dataset, rank_share(len(dataset), rank, world_size), batch_size, workers)


def keyed_loader(dataset: ImageFolder, keys: list[Key], batch_size: int, workers: int = 0) -> Loader:
    """Yields `dataset[key]` for these keys (epoch, index) in their order, in batches; the last one may be smaller."""
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return _loader(dataset, batches, batch_size, workers)


def _loader(dataset: ImageFolder, batches: EpochSampler | list[list[Key]], batch_size: int, workers: int) -> Loader:
    if dataset.loader == "dali":
        from .dali import DaliBatches, DaliLoader

        if dataset.device.type == "cuda":
            return DaliLoader(dataset, batches, batch_size, workers)
        return TorchLoader(DaliBatches(dataset, batch_size), batches, workers)
    return TorchLoader(dataset, batches, workers)
