"""Random crops of an image and its mask together, and the data set of them that the training loop reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...data.draws import Key, image_keys
from ...data.images import ImageList
from ...errors import DataError, require
from ...models.vit import IMAGENET_MEAN
from .masks import IGNORED, MaskList

LONGEST = 4  # an image's longer side is at most this many times the base size: the reference's 2048 for 512
PLACES_TRIED = 10
# levels are added for brightness and multiplied for contrast, as the reference does
DISTORTIONS = {"brightness": (-32.0, 32.0), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}


def scaled_size(size: tuple[int, int], base: int, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes ``base * scale``, or whose longer one four times that."""
    factor = scale * min(base / min(size), LONGEST * base / max(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


class TrainView:
    """An image scaled at random, cut, flipped in half of the cases and distorted in its colors, with its mask.

    Of up to ten places of the crop the first is taken in which no class has more than ``max_class_share`` of the labels
    that count. What is missing to a full square is filled with ImageNet's mean color and the label 255. The image is
    resized bilinearly, the mask to nearest labels.

    Args:
        size: of the crop. base_size: of the shorter side at scale 1. scale_range: of random scales.
        distortion: each of brightness, contrast, saturation and hue changes in half of the cases.
    """

    def __init__(
        self,
        size: int,
        base_size: int,
        scale_range: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        distortion: bool = True,
    ):
        require("torchvision.transforms.v2", "train", "Cutting images and masks")
        self.size, self.base_size, self.scale_range = size, base_size, scale_range
        self.max_class_share, self.distortion = max_class_share, distortion

    def __call__(self, image: Image.Image, mask: np.ndarray, key: int) -> tuple[Tensor, Tensor]:
        """Image, labels uint8 [H, W] and 64 random bits -> uint8 [3, size, size], uint8 [size, size]."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional as F

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            pair: Sequence[Tensor]
            pair = tv_tensors.Image(F.pil_to_tensor(image.convert("RGB"))), tv_tensors.Mask(torch.from_numpy(mask))
            size = list(scaled_size(mask.shape, self.base_size, _uniform(*self.scale_range)))
            pair = [F.resize(x, size, antialias=True) for x in pair]
            box = self._crop(pair[1])
            pair = [F.crop(x, *box) for x in pair]
            if torch.rand(()) < 0.5:
                pair = [F.horizontal_flip(x) for x in pair]
            picture, labels = pair
            if self.distortion:
                picture = _distort(picture)
            missing = [0, 0, self.size - box[3], self.size - box[2]]
            picture = F.pad(picture, missing, fill=[round(255 * m) for m in IMAGENET_MEAN])
            return picture.as_subclass(Tensor), F.pad(labels, missing, fill=IGNORED).as_subclass(Tensor)

    def _crop(self, mask: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height, width."""
        height, width = (min(side, self.size) for side in mask.shape)
        for _ in range(PLACES_TRIED):
            top, left = (
                int(torch.randint(side - cut + 1, ())) for side, cut in zip(mask.shape, (height, width), strict=True)
            )
            counts = torch.bincount(mask[top : top + height, left : left + width].flatten(), minlength=256)[:IGNORED]
            if counts.count_nonzero() > 1 and counts.max() < self.max_class_share * counts.sum():
                break
        return top, left, height, width


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _distort(picture: Tensor) -> Tensor:
    """Contrast comes before saturation and hue or after them, as the reference has it."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    order = ["brightness", "contrast", "saturation", "hue"]
    if torch.rand(()) < 0.5:
        order = ["brightness", "saturation", "hue", "contrast"]
    for name in order:
        if torch.rand(()) < 0.5:
            value = _uniform(*DISTORTIONS[name])
            if name in ("brightness", "contrast"):
                levels = picture.float() + value if name == "brightness" else picture.float() * value
                picture = tv_tensors.Image(levels.clamp(0, 255).to(torch.uint8))
            else:
                picture = getattr(F, f"adjust_{name}")(picture, value)
    return picture


class SegmentationFolder(Dataset[dict[str, Tensor]]):
    """Images and masks as the training loop reads them: ``folder[keys]`` follows from (seed, epoch, index) only.

    Args:
        images, masks: as ``check_images`` and ``find_masks`` returned them.
        table: see ``label_table``.
        view: image, labels and 64 random bits -> tensors; None: both as they are, uint8 [3, H, W] and [H, W].
        in_memory: decode everything now and keep it.
    """

    loader, device = "torchvision", torch.device("cpu")

    def __init__(
        self,
        images: ImageList,
        masks: MaskList,
        table: np.ndarray,
        view: Callable[[Image.Image, np.ndarray, int], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        *,
        in_memory: bool = False,
    ):
        self.images, self.masks, self.table, self.view, self.seed = images, masks, table, view, seed
        self._decoded = None
        if in_memory:
            with ThreadPoolExecutor() as pool:
                self._decoded = list(pool.map(self._open, range(len(images))))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        epochs, indices = (np.array(part) for part in zip(*keys, strict=True))
        bits = image_keys(self.seed, epochs, indices)
        pairs = [self._view(index, int(key >> np.uint64(1))) for index, key in zip(indices.tolist(), bits, strict=True)]
        images, masks = (torch.stack(part) for part in zip(*pairs, strict=True))
        return {"image": images, "mask": masks, "index": torch.from_numpy(indices), "view": torch.from_numpy(epochs)}

    def _view(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        image, mask = self._open(index) if self._decoded is None else self._decoded[index]
        if self.view is not None:
            return self.view(image, mask, key)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), torch.from_numpy(mask)

    def _open(self, index: int) -> tuple[Image.Image, np.ndarray]:
        path = self.images.paths[index]
        try:
            image, path = self.images.open(index), self.masks.paths[index]
            return image, self.table[self.masks.open(index)]
        except Exception as error:  # a decoder may raise anything at all on a damaged file
            raise DataError(
                f"{path} could be read when it was checked, but cannot be now ({error}). Put it back, or start again "
                "so that the images are checked again."
            ) from error
