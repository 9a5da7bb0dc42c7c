"""What is random about an image, a function of (seed, epoch, index): its place in the epoch, crop, flip, colors, mask.

So a resumed run repeats an uninterrupted one without any saved state, whatever the number of workers and ranks. The
numbers of an image are those of its key (see ``kernels.counter_random``), and a whole batch draws at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import DataError
from ..kernels.block_masks import block_masks, check_count
from ..kernels.counter_random import random_bits, wrapped

CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
JITTER_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
# Where each use starts to count, far enough apart that none reads another's numbers.
CROP, FLIP, JITTER, AUGMENT = 0, 64, 80, 128
MASK_STREAM, ORDER_STREAM = 1, 2

Key = tuple[int, int]  # epoch, index
Draws = dict[str, np.ndarray]  # by name, an entry per image


def image_keys(seed: int, epochs: np.ndarray, indices: np.ndarray, stream: int = 0) -> np.ndarray:
    """One uint64 for each (epoch, index) [B]; neighboring seeds, epochs, indices and streams share nothing."""
    key = np.full(len(indices), wrapped(seed))
    for part in (epochs, indices, stream):
        key = random_bits(np.asarray(part).astype(np.int64), key + 1)
    return key.view(np.uint64)


def mask_keys(keys: np.ndarray) -> np.ndarray:
    """The keys of ``patch_masks`` for images, uint64 [B] -> int64 [B]."""
    return random_bits(keys.view(np.int64) + MASK_STREAM, 0)


def uniforms(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """Numbers first .. first + count - 1 of each key, in [0, 1): uint64 [B] -> [B, count] float64."""
    bits = random_bits(keys.view(np.int64)[:, None], np.arange(first, first + count))
    return (bits.view(np.uint64) >> np.uint64(11)) * 2.0**-53


def random_crops(sizes: np.ndarray, scale: tuple[float, float], keys: np.ndarray) -> np.ndarray:
    """Crops of images of sizes [B, 2] (width, height): area uniform in ``scale`` times the image's, aspect ratio
    log-uniform in [3/4, 4/3], place uniform. If ten of them do not fit, the largest center crop of allowed ratio.

    Returns int64 [B, 4]: left, top, right, bottom in pixels. As torchvision's RandomResizedCrop draws them.
    """
    u = uniforms(keys, CROP, 4 * _CROP_ATTEMPTS).reshape(-1, _CROP_ATTEMPTS, 4)
    width, height = sizes[:, :1], sizes[:, 1:]
    area = width * height * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    log_low, log_high = np.log(CROP_RATIO)
    ratio = np.exp(log_low + (log_high - log_low) * u[..., 1])
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)  # [B, attempts]
    rows, first = np.arange(len(keys)), fits.argmax(1)
    w, h, place = w[rows, first], h[rows, first], u[rows, first, 2:]
    left = (place[:, 0] * (sizes[:, 0] - w + 1)).astype(np.int64)
    top = (place[:, 1] * (sizes[:, 1] - h + 1)).astype(np.int64)
    crops = np.stack([left, top, left + w, top + h], 1)
    return np.where(fits.any(1)[:, None], crops, _center_crops(sizes))


def _center_crops(sizes: np.ndarray) -> np.ndarray:
    width, height = sizes.T
    low, high = CROP_RATIO
    w = np.minimum(width, np.rint(height * high).astype(np.int64))
    h = np.minimum(height, np.rint(width / low).astype(np.int64))
    left, top = (width - w) // 2, (height - h) // 2
    return np.stack([left, top, left + w, top + h], 1)


def random_flips(keys: np.ndarray) -> np.ndarray:
    """bool [B], True in half of the cases."""
    return uniforms(keys, FLIP, 1)[:, 0] < 0.5


def jitter_steps(keys: np.ndarray, strength: float) -> Draws:
    """What color jitter does to each image: "jitter_step" [B, 3], an order of 0 brightness, 1 contrast, 2 saturation;
    "jitter_factor" [B, 3], uniform in [1 - strength, 1 + strength], in that order. Nothing if strength is 0."""
    if strength == 0:
        return {}
    u = uniforms(keys, JITTER, 4)
    order = JITTER_ORDERS[(u[:, 0] * len(JITTER_ORDERS)).astype(np.int64)]
    return {"jitter_step": order, "jitter_factor": 1 - strength + 2 * strength * u[:, 1:]}


def patch_masks(
    keys: Tensor,
    kind: str,
    grid: tuple[int, int],
    num_masked: int,
    min_patches: int,
    max_patches: int | None = None,
) -> Tensor:
    """The student's masks, bool [B, H*W] on the device of the keys [B] int64: of kind "block" or "random"."""
    if kind == "random":
        return random_masks(keys, grid, num_masked).flatten(1)
    return block_masks(keys, grid, num_masked, min_patches=min_patches, max_patches=max_patches).flatten(1)


def random_masks(keys: Tensor, grid: tuple[int, int], num_masked: int) -> Tensor:
    """Draws a mask of exactly ``num_masked`` patches for each key, every set of patches equally likely (the ablation
    without blocks).

    Args and result are those of ``block_masks``: keys [B] int64 -> bool [B, H, W] on the same device, which follow from
    (keys, settings) only. Raises ValueError for an impossible grid or number.
    """
    height, width = grid
    check_count(grid, num_masked)
    bits = random_bits(keys[:, None], torch.arange(height * width, device=keys.device))
    mask = torch.zeros(bits.shape, dtype=torch.bool, device=keys.device)
    mask.scatter_(1, bits.argsort(dim=1)[:, :num_masked], True)
    return mask.view(-1, height, width)


class EpochSampler(Sampler[list[Key]]):
    """The batches of one rank for steps start_step .. total_steps - 1, as lists of (epoch, index).

    The epochs, each a permutation of all images from (seed, epoch), follow one another without a gap: step k takes
    images k*G .. (k+1)*G - 1 of that row, with G = batch_size * world_size, and rank r has the r-th slice of it. So
    every image is seen once per epoch, also where G does not divide their number: the batch between has images of both.

    Args:
        length: the number of images.
        batch_size: images per rank and step.

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
        check_batch(length, batch_size, world_size)
        self.length, self.seed = length, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start_step, self.total_steps = start_step, total_steps

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        permutation_of, order = -1, np.empty(0)
        for step in range(self.start_step, self.total_steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            keys: list[Key] = []
            while len(keys) < self.batch_size:
                epoch, place = divmod(first + len(keys), self.length)
                if epoch != permutation_of:
                    permutation_of, order = epoch, self._permutation(epoch)
                keys += [(epoch, index) for index in order[place : place + self.batch_size - len(keys)].tolist()]
            yield keys

    def _permutation(self, epoch: int) -> np.ndarray:
        """Sorts the images by a random key each: at 1.3 million images this takes 0.2 s, once per epoch."""
        indices = np.arange(self.length)
        return np.argsort(
            image_keys(self.seed, np.full(self.length, epoch), indices, stream=ORDER_STREAM), kind="stable"
        )


def check_batch(length: int, batch_size: int, world_size: int = 1) -> None:
    """DataError if a step of batch_size images on each of world_size ranks has more images than there are."""
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size is {batch_size} and world_size {world_size}; both must be at least 1")
    if batch_size * world_size > length:
        ranks = f" ({batch_size} on each of {world_size} ranks)" if world_size > 1 else ""
        raise DataError(
            f"A batch of {batch_size * world_size} images{ranks} is larger than the data set of {length}. Choose a "
            "smaller batch or add images."
        )


def rank_share(length: int, rank: int, world_size: int) -> list[Key]:
    """(0, index) of the images rank, rank + world_size, ...: over all ranks every image once, none twice."""
    return [(0, index) for index in range(rank, length, world_size)]
