"""What fine-tuning does to a whole batch once it is on the device: erasing, then mixup or cutmix, and soft targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require


class BatchAugment:
    """Erases, mixes and smooths, by torchvision's transforms.

    Every image is erased with probability ``erasing`` in one rectangle, filled with normal noise. Then the whole batch
    is mixed by mixup or by cutmix. The randomness is torch's: seeded before each step, a resumed run repeats it.

    Args:
        num_classes: K.
        mixup, cutmix: the alphas of their Beta distributions; 0: not used (0.8 and 1.0 in the fine-tuning of BEiT v2).
        cutmix_share: how often cutmix is used where both are.
        smoothing: label smoothing, 0 .. 1.
        erasing: probability.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        cutmix_share: float = 0.5,
        smoothing: float = 0.1,
        erasing: float = 0.25,
    ) -> None:
        for name, value in {"cutmix_share": cutmix_share, "smoothing": smoothing, "erasing": erasing}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected 0 to 1")
        if num_classes < 1 or mixup < 0 or cutmix < 0:
            raise ValueError(
                f"num_classes is {num_classes}, mixup {mixup}, cutmix {cutmix}; expected at least 1 class and alphas "
                "of at least 0"
            )
        v2 = require("torchvision.transforms.v2", "train", "Augmenting for fine-tuning")
        self.num_classes, self.smoothing = num_classes, smoothing
        self._erase = v2.RandomErasing(p=erasing, value="random") if erasing else None
        mixers = {"mixup": (v2.MixUp, mixup, 1 - cutmix_share), "cutmix": (v2.CutMix, cutmix, cutmix_share)}
        used = {n: (mixer(alpha=a, num_classes=num_classes), share) for n, (mixer, a, share) in mixers.items() if a > 0}
        shares = [share for _, share in used.values()] if len(used) == 2 else None
        self._mix = v2.RandomChoice([mixer for mixer, _ in used.values()], p=shares) if used else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], normalized, and labels [B] int64 -> images, targets [B, K] whose rows sum to 1."""
        if self._erase is not None:
            images = torch.stack([self._erase(image) for image in images])
        if self._mix is not None:
            images, targets = self._mix(images, labels)
        else:
            targets = F.one_hot(labels, self.num_classes)
        return images, targets.to(torch.float32) * (1 - self.smoothing) + self.smoothing / self.num_classes
