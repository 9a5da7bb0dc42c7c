"""Images whose every pixel follows from (seed, epoch, index).

So a resumed run sees what the uninterrupted one would have seen, whatever the number of workers, and the global batches
do not depend on the number of ranks they are divided among.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .draws import Draws, image_keys
from .images import DataError, ImageList
from .sampler import Key
from .views import View, pictures_of

log = logging.getLogger(__name__)


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
