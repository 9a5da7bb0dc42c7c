"""Batches of an ImageFolder for training and for evaluation: by DALI, by PIL with torch's workers, or cut out of images
that lie decoded on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError, require
from .draws import EpochSampler, Key, rank_share
from .images import ImageFolder, ImageList
from .stored import AUTO_BYTES, cannot_be_stored, stored_bytes
from .stored_loader import StoredLoader
from .torch_loader import FinishingLoader, TorchLoader
from .views import View


class Loader(Protocol):
    """Batches in turn: dicts of tensors, those of the view [B, ...] and "index", "view" and "label" int64 [B]."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...


def choose_loader(
    wanted: str,
    *,
    in_memory: bool = False,
    images: ImageList | None = None,
    view: View | None = None,
    device: torch.device | None = None,
) -> tuple[str, str]:
    """-> ("gpu", "dali" or "torchvision", why). ``wanted`` is one of those or "auto": on a GPU, "gpu" if the images are
    few and small enough to be decoded at the start and to lie there; else DALI where it is installed, unless the images
    are decoded in memory, where it would have nothing to do.

    Args:
        images, view, device: what will be loaded, and where to. Without them, before the images have been checked,
            "auto" does not choose "gpu", and whether they can be loaded by it is not asked.

    Raises:
        UserError: DALI is wanted and not installed, or wanted with images in memory; the images or the view are
            nothing for "gpu".
    """
    if view is not None and view.needs_pil:
        if wanted not in ("auto", "torchvision"):
            raise UserError(f"--loader {wanted}: {view.needs_pil} takes PIL images. Use --loader torchvision, or auto.")
        return "torchvision", f"{view.needs_pil} takes PIL images"
    if wanted not in ("auto", "gpu"):
        return _by_decoding(wanted, in_memory)
    sizes = None if images is None else images.sizes
    why_not = None if sizes is None or device is None else cannot_be_stored(sizes, device)
    if view is not None and view.augments:
        why_not = "RandAugment is done by PIL (--augment-ops 0 leaves it out)"
    if wanted == "gpu" and why_not:
        raise UserError(f"--loader gpu: {why_not}. Use another loader, or auto.")
    if wanted == "gpu":
        return wanted, "as asked for"
    if sizes is None or device is None or device.type != "cuda":
        return _by_decoding(wanted, in_memory)
    needed = f"the decoded images take {stored_bytes(sizes) / 1e9:.2f} GB"
    if why_not is None and stored_bytes(sizes) > AUTO_BYTES:
        why_not = f"{needed}, which is long to be decoded at the start"
    if why_not is None:
        return "gpu", f"{needed} of its memory"
    name, why = _by_decoding(wanted, in_memory)
    return name, f"{why}; not gpu: {why_not}"


def _by_decoding(wanted: str, in_memory: bool) -> tuple[str, str]:
    if wanted == "torchvision":
        return wanted, "as asked for"
    if wanted == "dali" and in_memory:
        raise UserError(
            "--in-memory keeps decoded images, but DALI decodes them itself. Give --no-in-memory, or --loader "
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
    """Yields this rank's batches for steps start_step .. total_steps - 1 (see ``EpochSampler``), then ends.

    ``workers`` processes prepare them (0: the calling one does); with DALI on a GPU as many threads; "gpu" needs none.
    Their number changes no pixel.

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
    return batch_loader(dataset, sampler, batch_size, workers)


def eval_loader(dataset: ImageFolder, batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1) -> Loader:
    """Yields all images once, in the list's order and as epoch 0, in batches like those of ``train_loader``; the last
    one may be smaller. Of several ranks each sees the images rank, rank + world_size, ...: "index" says which."""
    return keyed_loader(dataset, rank_share(len(dataset), rank, world_size), batch_size, workers)


def keyed_loader(dataset: ImageFolder, keys: list[Key], batch_size: int, workers: int = 0) -> Loader:
    """Yields ``dataset[key]`` for these keys (epoch, index) in their order, in batches; the last one may be smaller."""
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return batch_loader(dataset, batches, batch_size, workers)


def batch_loader(
    dataset: ImageFolder, batches: EpochSampler | list[list[Key]], batch_size: int, workers: int = 0
) -> Loader:
    """Yields ``dataset.__getitems__(keys)`` for each of the batches; batch_size: of the largest one."""
    workers = min(workers, len(batches))
    if dataset.loader == "gpu":
        return StoredLoader(dataset, batches)
    if dataset.loader == "dali":
        from .dali import DaliBatches, DaliLoader

        if dataset.device.type == "cuda":
            return DaliLoader(dataset, batches, batch_size, workers)
        return TorchLoader(DaliBatches(dataset, batch_size), batches, workers)
    if dataset.device.type == "cuda":
        return FinishingLoader(dataset, batches, workers)
    return TorchLoader(dataset, batches, workers)
