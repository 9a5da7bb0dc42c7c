"""The codes of a data set: how often each is used, and at which patches."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.find import in_turns
from ..data.images import ImageFolder, ImageList
from ..data.loaders import eval_loader
from ..data.views import EvalView
from ..errors import require
from ..models.tokenizer import Tokenizer


def choose_patches(codes: Tensor, code: int, count: int, seed: int) -> list[tuple[int, int]]:
    """(image, patch) of ``count`` occurrences of a code in codes [images, N], from as many images as possible."""
    generator = random.Random(f"{seed} {code}")
    by_image = defaultdict(list)
    for image, patch in (codes == code).nonzero().tolist():
        by_image[image].append((image, patch))
    found = list(by_image.values())
    generator.shuffle(found)
    for patches in found:
        generator.shuffle(patches)
    return in_turns(found)[:count]


def choose_codes(usage: CodeUsage, rows: int) -> tuple[list[int], int]:
    """(codes of a sheet, how many of them are the most frequent): half of the rows, then an even spread by rank."""
    ranking = usage.ranking[: usage.used].tolist()
    if len(ranking) <= rows:
        return ranking, len(ranking)
    top = (rows + 1) // 2
    rest, spread = ranking[top:], rows - top
    return ranking[:top] + [rest[round((k + 0.5) * len(rest) / spread - 0.5)] for k in range(spread)], top


@torch.inference_mode()
def encode_images(tokenizer: Tokenizer, images: ImageList, device: torch.device, batch: int, workers: int) -> Tensor:
    """The codes of the center square of every image: [images, N] int64."""
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    loader = eval_loader(ImageFolder(images, EvalView(tokenizer.config.encoder.image_size, 1.0)), batch, workers)
    bar = tqdm(loader, desc="report: codes of the photographs", unit="batch", dynamic_ncols=True, disable=None)
    return torch.cat([tokenizer.encode(found["image"].to(device)).cpu() for found in bar])


@dataclass(frozen=True)
class CodeUsage:
    """How often each code occurs: counts [K] int64."""

    counts: Tensor

    @property
    def num_codes(self) -> int:
        return len(self.counts)

    @property
    def used(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def shares(self) -> Tensor:
        return self.counts.double() / self.counts.sum().clamp(min=1)

    @property
    def entropy(self) -> float:
        """In nats: the cross entropy of a guess that knows only the frequencies."""
        return float(-torch.special.xlogy(self.shares, self.shares).sum())

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.entropy).exp())

    @property
    def ranking(self) -> Tensor:
        """Codes by falling frequency, the lower id first among equals."""
        return self.counts.argsort(descending=True, stable=True)

    def covering(self, share: float) -> int:
        """The least number of codes that make up this share of all patches."""
        return int((self.shares[self.ranking].cumsum(0) < share - 1e-12).sum()) + 1
