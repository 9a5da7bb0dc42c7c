"""Every patch of the data set: its code, its features, and what is typical of a code."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.show import ExploreConfig
from ..errors import require
from ..models.features import nearest
from ..pictures import code_colors
from .codes import CodeUsage
from .runs import Runs

BATCH = 32
CELL = 32  # pixels of a typical patch's side
SAMPLED = 48  # patches of a code whose median is taken, fewer for a codebook that would need more than this:
SAMPLE_BYTES = 256 << 20


@dataclass(frozen=True)
class Index:
    """codes: [images, N]. colors: [K, 3]. features: by model, of every patch [images * N, C] fp16, unit length.

    typical: [K, CELL, CELL, 3] uint8, a real patch of each code (see ``TypicalPatches``); gray for a code without any.
    """

    codes: Tensor
    usage: CodeUsage
    colors: Tensor
    features: dict[str, Tensor]
    typical: np.ndarray


def build_index(runs: Runs, config: ExploreConfig) -> Index:
    """Look at every image once, on the models' device."""
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    models = [name for name in ("student", "tokenizer", "teacher") if getattr(runs, name) is not None]
    codes: list[Tensor] = []
    features: dict[str, list[Tensor]] = {name: [] for name in models}
    typical = TypicalPatches(runs.tokenizer.num_codes, config.seed)
    title, total = "explore: reading the data set", len(runs.images)
    bar = tqdm(desc=title, total=total, unit="image", dynamic_ncols=True, disable=None)
    with bar, ThreadPoolExecutor(2) as pool:
        for first in range(0, len(runs.images), BATCH):
            indices = range(first, min(first + BATCH, len(runs.images)))
            views = runs.views(pool.map(runs.images.open, indices))
            codes.append(views.codes())
            for name in models:
                features[name].append(views.features(name).half().flatten(0, 1))
            typical.add(codes[-1], cut(views.of["tokenizer"].cpu(), runs.grid))
            bar.update(len(indices))
    all_codes = torch.cat(codes)
    usage = CodeUsage(torch.bincount(all_codes.flatten(), minlength=runs.tokenizer.num_codes))
    colors = code_colors(runs.tokenizer.quantize.codebook.cpu(), usage.counts)
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    return Index(all_codes, usage, colors, joined, typical.choose())


def cut(images: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Images [B, 3, S, S] in [0, 1] -> their patches [B * N, S/h, S/w, 3] uint8, row by row."""
    h, w = images.shape[2] // grid[0], images.shape[3] // grid[1]
    cells = images.unfold(2, h, h).unfold(3, w, w)  # [B, 3, rows, columns, h, w]
    cells = cells.permute(0, 2, 3, 4, 5, 1).flatten(0, 2)
    return (cells * 255).round().to(torch.uint8).numpy()


class TypicalPatches:
    """For each code the patch that stands for it: of a sample, the one nearest to the sample's median, pixel by pixel.

    The median itself is a blur that no photograph contains; the patch nearest to it has the median's brightness and
    layout, and a real texture. The sample is uniform over all patches of the code (reservoir sampling, by seed).
    """

    def __init__(self, num_codes: int, seed: int):
        self.random = np.random.default_rng(seed)
        self.size = max(4, min(SAMPLED, SAMPLE_BYTES // (num_codes * 16 * 16 * 3)))
        self.seen = np.zeros(num_codes, np.int64)
        self.kept: dict[int, list[np.ndarray]] = {}

    def add(self, codes: Tensor, patches: np.ndarray) -> None:
        """codes: [...], of patches [..., h, w, 3] flattened."""
        for code, patch in zip(codes.flatten().tolist(), patches, strict=True):
            kept = self.kept.setdefault(code, [])
            self.seen[code] += 1
            if len(kept) < self.size:
                kept.append(patch.copy())
            elif (place := int(self.random.integers(self.seen[code]))) < self.size:
                kept[place] = patch.copy()

    def choose(self) -> np.ndarray:
        """[K, CELL, CELL, 3] uint8."""
        from PIL import Image

        result = np.full((len(self.seen), CELL, CELL, 3), 127, np.uint8)
        for code, kept in self.kept.items():
            sample = np.stack(kept).astype(np.float32)
            distance = ((sample - np.median(sample, axis=0)) ** 2).sum((1, 2, 3))
            picture = Image.fromarray(kept[int(distance.argmin())])
            result[code] = np.asarray(picture.resize((CELL, CELL), Image.Resampling.BICUBIC))
        return result


def sprite(typical: np.ndarray) -> np.ndarray:
    """Typical patches [K, s, s, 3] side by side in rows of ceil(sqrt(K)): one picture [H, W, 3]."""
    count, side = len(typical), typical.shape[1]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, side, side, 3), 127, np.uint8)
    cells[:count] = typical
    return cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def nearest_patches(index: Index, query: Tensor, model: str, count: int) -> list[dict[str, Any]]:
    """The patches of the data set with the largest cosine to a feature [C], one per image, the nearest first."""
    found = one_per_image(index.features[model], query, index.codes.shape[1], count)
    return [{**row, "code": int(index.codes[int(row["image"]), int(row["patch"])])} for row in found]


def one_per_image(features: Tensor, query: Tensor, patches: int, count: int) -> list[dict[str, int | float]]:
    """The patches with the largest cosine to a query, at most one per image: ``image``, ``patch``, ``cosine`` of each.

    Looked for among the ``16 * count`` nearest patches, so there may be fewer than ``count``.

    Args:
        features: of every patch, image after image [images * patches, C]. query: [C].
    """
    cosines, found = nearest(features, query[None], 16 * count)
    best: dict[int, dict[str, int | float]] = {}
    for at, cosine in zip(found[0].tolist(), cosines[0].tolist(), strict=True):
        image, patch = divmod(at, patches)
        best.setdefault(image, {"image": image, "patch": patch, "cosine": cosine})
    return list(best.values())[:count]
