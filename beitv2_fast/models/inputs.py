"""What pixels the models read."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """(image - mean) / std by channel: [..., 3 or 1, H, W] in [0, 1] -> [..., 3, H, W]. TypeError: integers."""
    require_floating(image)
    statistics = torch.tensor((mean, std), dtype=image.dtype).view(2, 3, 1, 1)
    mean_, std_ = statistics.to(image.device, non_blocking=True)  # image.new_tensor would wait for a GPU
    return (image - mean_) / std_


def require_floating(images: Tensor) -> None:
    """TypeError if images are integers, of which the arithmetic on them would make wrong numbers.

    Their range is not looked at: on a GPU that would wait for them.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"the images are {str(images.dtype).removeprefix('torch.')}, but floating-point numbers are needed. Of "
            "pixels from 0 to 255 make images.float() / 255, in [0, 1]."
        )
