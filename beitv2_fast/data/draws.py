"""The random numbers of an image: a function of (seed, epoch, index), for a whole batch at once.

Number k of an image is had from its key without those before it (``kernels/counter_random.py``), so no state has to be
saved to resume a run.
"""

import numpy as np

from ..kernels.counter_random import random_bits, wrapped

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
JITTER_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
# Where each use starts to count, far enough apart that none reads another's numbers.
CROP, FLIP, JITTER, AUGMENT = 0, 64, 80, 128
MASK_STREAM = 1

Draws = dict[str, np.ndarray]  # by name, an entry an image


def image_keys(seed: int, epochs: np.ndarray, indices: np.ndarray, stream: int = 0) -> np.ndarray:
    """One uint64 for each (epoch, index) [B]; neighbouring seeds, epochs, indices and streams share nothing."""
    key = np.full(len(indices), wrapped(seed))
    for part in (epochs, indices, stream):
        key = random_bits(np.asarray(part).astype(np.int64), key + 1)
    return key.view(np.uint64)


def mask_keys(keys: np.ndarray) -> np.ndarray:
    """The keys of the images' masks, uint64 [B] -> int64 [B]."""
    return random_bits(keys.view(np.int64) + MASK_STREAM, 0)


def uniform(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """Numbers first .. first + count - 1 of each key, in [0, 1): [B] -> [B, count] float64."""
    bits = random_bits(keys.view(np.int64)[:, None], np.arange(first, first + count))
    return (bits.view(np.uint64) >> np.uint64(11)) * 2.0**-53


def random_crops(sizes: np.ndarray, scale: tuple[float, float], keys: np.ndarray) -> np.ndarray:
    """Crops of images of sizes [B, 2] (width, height): area uniform in `scale` times the image's, aspect ratio
    log-uniform in [3/4, 4/3], place uniform. If ten of them do not fit, the largest centre crop of allowed ratio.

    Returns int64 [B, 4]: left, top, right, bottom in pixels. As torchvision's RandomResizedCrop draws them.
    """
    u = uniform(keys, CROP, 4 * CROP_ATTEMPTS).reshape(-1, CROP_ATTEMPTS, 4)
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
    return np.where(fits.any(1)[:, None], crops, _centre_crops(sizes))


def _centre_crops(sizes: np.ndarray) -> np.ndarray:
    width, height = sizes.T
    low, high = CROP_RATIO
    w = np.minimum(width, np.rint(height * high).astype(np.int64))
    h = np.minimum(height, np.rint(width / low).astype(np.int64))
    left, top = (width - w) // 2, (height - h) // 2
    return np.stack([left, top, left + w, top + h], 1)


def random_flips(keys: np.ndarray) -> np.ndarray:
    """bool [B], True in half of the cases."""
    return uniform(keys, FLIP, 1)[:, 0] < 0.5


def jitter_steps(keys: np.ndarray, strength: float) -> Draws:
    """What colour jitter does to each image: "jitter_step" [B, 3], an order of 0 brightness, 1 contrast, 2 saturation;
    "jitter_factor" [B, 3], uniform in [1 - strength, 1 + strength], in that order. Nothing if strength is 0."""
    if strength == 0:
        return {}
    u = uniform(keys, JITTER, 4)
    order = JITTER_ORDERS[(u[:, 0] * len(JITTER_ORDERS)).astype(np.int64)]
    return {"jitter_step": order, "jitter_factor": 1 - strength + 2 * strength * u[:, 1:]}
