"""Images: lists of them, how one is read whatever its format, and the data set whose every pixel follows from (seed,
epoch, index).
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .draws import Draws, Key, image_keys
from .forks import by_processes, processes_for
from .names import PassedOver, shared_keys, told
from .stored import StoredImages
from .views import EvalView, Pictures, View, cut_out

EXIF_ORIENTATION = 0x0112
DECODED_AT_ONCE = 64  # images
HEADER_BYTES = 2**14
_SHARD_END = re.compile(r"(?<=\.tar)/|(?<=\.arrow)/")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageList:
    """Images in a fixed order: the files of a folder, members of tar shards or rows of Arrow files.

    Attributes:
        root: the folder.
        paths: the files, relative to root with forward slashes, sorted; of shards SHARD.tar/MEMBER, FILE.arrow/ROW.
        labels: for each path the index of its class; None if there are no classes.
        classes: the names of the classes, sorted; empty if there are none.
        rejected: (path, reason) of each file that was left out.
        spans: of shards, where each image lies: (first byte in the shard, number of bytes); None for a folder.
        passed_over: what else lies there.
        sizes: (width, height) of each, turned upright; None before ``check_images``, or if that read nothing.
        layout: what tells of them, where that is neither the folder nor its tar shards.
    """

    root: Path
    paths: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None
    passed_over: PassedOver = field(default_factory=dict)
    sizes: list[tuple[int, int]] | None = None
    layout: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The file that holds the image: its own, or its shard."""
        path = self.paths[index]
        return self.root / (path if self.spans is None else _SHARD_END.split(path, maxsplit=1)[0])

    def read(self, index: int, at_most: int | None = None) -> bytes:
        """The encoded image, or its first bytes. OSError if they cannot be read, or no longer as a whole."""
        if self.spans is None:
            with self.file(index).open("rb") as file:
                return file.read(at_most)
        first, length = self.spans[index]
        length = length if at_most is None else min(length, at_most)
        data = _shard(self.file(index)).read(first, length)
        if len(data) < length:
            raise OSError(f"the shard ends {length - len(data)} bytes too early")
        return data

    def open(self, index: int) -> Image.Image:
        """``open_image`` of image ``index``; raises what the decoder raises."""
        return open_image(io.BytesIO(self.read(index)))

    def header(self, index: int) -> tuple[int, int]:
        """The upright width and height that the header says, read without decoding; raises as ``open`` does."""
        try:
            return _upright_size(self.read(index, HEADER_BYTES))
        except Exception:  # formats that keep it elsewhere, long metadata
            return _upright_size(self.read(index))

    def subset(self, indices: list[int], rejected: list[tuple[str, str]] | None = None) -> ImageList:
        """These images, with the same classes."""
        rejected, paths = self.rejected if rejected is None else rejected, [self.paths[i] for i in indices]
        lists: dict[str, list[Any] | None] = {"labels": self.labels, "spans": self.spans, "sizes": self.sizes}
        chosen: dict[str, Any] = {name: None if a is None else [a[i] for i in indices] for name, a in lists.items()}
        return replace(self, paths=paths, rejected=rejected, **chosen)

    @property
    def summary(self) -> str:
        """One line: how many images of which classes, in which layout, and what was passed over."""
        names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        classes = f"{len(self.classes):,} classes ({names})" if self.classes else "no classes"
        if self.spans is None:
            layout, more = "class folders" if self.classes else "folder", ""
        else:
            layout, more = "tar shards", shared_keys(self.paths)
        layout = self.layout or layout
        return f"found {len(self):,} images, {classes}, {layout} in {self.root}{more}{told(self.passed_over)}"

    @property
    def fingerprint(self) -> str:
        """A hash of paths and labels: resuming a run on a list with another one would show it other images."""
        content = json.dumps([self.paths, self.labels]).encode()
        return hashlib.sha256(content).hexdigest()[:16]


class _Shard:
    """An open shard, closed when nobody reads from it any more. Processes and threads may share it: ``pread`` moves no
    common position."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, first: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, first)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_shard = functools.lru_cache(maxsize=256)(_Shard)  # opening costs a round trip on network storage


def open_image(path: str | Path | io.BytesIO) -> Image.Image:
    """Decodes an image file to 8 bits per channel, turned upright by its EXIF orientation.

    Returns a loaded PIL image in mode "RGB", or "L" if the file is gray (a third of the work for all that follows).
    16-bit gray is scaled by 255 / 65535; palette and CMYK are converted; transparency is dropped.

    Raises:
        OSError, ValueError, SyntaxError, ...: whatever the decoder finds wrong with the file.
    """
    with Image.open(path) as file:
        file.load()
        turned = file.getexif().get(EXIF_ORIENTATION, 1) != 1
        image: Image.Image = ImageOps.exif_transpose(file) if turned else file
        if image.mode in ("RGB", "L"):
            return image
        if image.mode.startswith("I"):
            return _from_16_bit(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
        return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _upright_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        exif = Image.Image.getexif(image)  # PngImageFile's own would decode the pixels to look behind them
        return image.size[::-1] if exif.get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8) else image.size


def _from_16_bit(image: Image.Image) -> Image.Image:
    image = image.convert("I")
    low, high = cast(tuple[int, int], image.getextrema())  # of one channel
    if low < 0 or high > 65535:
        raise ValueError(f"32-bit pixels from {low} to {high}; save it with 8 or 16 bits (0 .. 65535)")
    return image.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def name_of(images: ImageList, index: int) -> str:
    """The class of an image, or its file's name."""
    if images.labels is None:
        return images.paths[index].rsplit("/", 1)[-1]
    return images.classes[images.labels[index]]


class ImageFolder(Dataset[dict[str, "Tensor | int | float"]]):
    """The views of the images of a list.

    ``folder[epoch, index]`` is the dict of the view's tensors, with "index", "view" (the epoch, or its remainder) and,
    if the list has labels, "label" (ints); ``folder.__getitems__(keys)`` is the same for a batch.
    Randomness comes only from (seed, epoch, index).

    Args:
        images: the images, as ``check_images`` returned them.
        view: what to make of an image.
        seed: of the views' randomness.
        views: V > 0: only V different views of every image, ``epoch % V``; 0: a new one in every epoch.
        in_memory: decode all images now and keep them, 1 byte (gray) or 3 per pixel, ``decoded_bytes`` in all. Worth it
            where decoding is the larger part of the work and the images fit; forked worker processes share them.
        loader: what makes batches of them: "torchvision" (PIL and torch's workers), "dali" or "gpu", which keeps all
            images decoded on the device, ``stored``, whether ``in_memory`` or not; see ``choose_loader``.
        device: where batches are made and left. PIL works on the CPU, whatever it says; of its pictures a GPU makes the
            batches (``FinishingLoader``).

    Raises:
        DataError: a file that could be read before no longer can.
        UserError: the images cannot be stored on the device.
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
        self.loader, self.device = loader, torch.device(device)
        self.stored: StoredImages | None = None
        self._decoded: list[Image.Image] | None = None
        if loader == "gpu":
            self.stored = StoredImages(self._decode_all(), self.device)
        elif in_memory:
            self._decoded = [Image.fromarray(pixels) for pixels in self._decode_all()]
            _log.info("%d decoded images take %.0f MB of memory", len(images), self.decoded_bytes / 1e6)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Tensor | int | float]:
        return {n: v[0] if v[0].dim() else v[0].item() for n, v in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        return {**self.view.finish(*self.cut(keys)), **self.names(keys)}

    def cut(self, keys: list[Key]) -> tuple[Pictures, Draws]:
        """What the view finishes: the pictures of a batch by PIL, and its random decisions."""
        images = [self._open(index) if self._decoded is None else self._decoded[index] for _, index in keys]
        draws = self.draws(keys, np.array([image.size for image in images]))
        return cut_out(images, self.view, draws), draws

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
        """The memory that the decoded images take; 0 unless ``in_memory``."""
        return sum(image.width * image.height * len(image.getbands()) for image in self._decoded or [])

    def _number(self, epoch: int) -> int:
        return epoch % self.views if self.views else epoch

    def _decode_all(self) -> Iterator[np.ndarray]:
        """uint8 [H, W] or [H, W, 3] of each image."""
        every = range(len(self))
        parts = [every[first : first + DECODED_AT_ONCE] for first in every[::DECODED_AT_ONCE]]
        return itertools.chain.from_iterable(by_processes(self._decode_some, parts, processes_for(len(self))))

    def _decode_some(self, indices: range) -> list[np.ndarray]:
        return [np.asarray(self._open(index)) for index in indices]

    def _open(self, index: int) -> Image.Image:
        try:
            return self.images.open(index)
        except Exception as error:  # a decoder may raise anything at all on a damaged file
            raise self.lost(index, error) from error


def read_images(paths: Sequence[str | Path], size: int, crop_pct: float = 1.0) -> Tensor:
    """Image files -> [B, 3, size, size] in [0, 1]: the central square (``crop_pct`` of it), resized bicubically."""
    view = EvalView(size, crop_pct)
    return torch.stack([view(open_image(path))["image"] for path in paths])
