"""The teacher's features, computed once for a fixed number of views of every image and kept in the run folder.

The teacher is the larger part of a tokenizer's step. With ``views = V`` an image is seen in V random crops in turn, so
that after the first pass over them the teacher has nothing left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .data import ImageFolder, keyed_loader
from .distributed import World
from .errors import UserError, require

IMAGES_A_FILE = 512

Teacher = Callable[[Tensor], Tensor]  # images [B, 3, S, S] in [0, 1] -> features [B, N, C]


class TeacherFeatures:
    """Features [B, N, C] by (view, index), read from files of fp16 that are mapped into memory.

    Args:
        folder: where the files are or will be. Each is written under another name and renamed, so an interrupted run
            computes only what is missing; its name says which teacher, data and views it belongs to.
        dataset: the views that the teacher sees; ``dataset.views`` of every image.
        teacher: what turns images into features, on ``world.device``.
        identity: what the features depend on beside the images, as JSON types; another identity, other files.
    """

    def __init__(
        self,
        folder: Path,
        dataset: ImageFolder,
        teacher: Teacher,
        world: World,
        *,
        identity: dict[str, object],
        batch_size: int = 32,
        workers: int = 0,
    ):
        key = json.dumps([identity, dataset.images.fingerprint, dataset.seed, dataset.views, repr(dataset.view)])
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.images = len(dataset)
        starts = [(v, i) for v in range(dataset.views) for i in range(0, self.images, IMAGES_A_FILE)]
        missing = [start for start in starts[world.rank :: world.size] if not self._file(*start).exists()]
        self._compute(missing, dataset, teacher, world, batch_size, workers)
        world.barrier()
        np = require("numpy", "train", "Keeping the teacher's features")
        self.parts = {start: np.load(self._file(*start), mmap_mode="r") for start in starts}
        self.device = world.device

    def __call__(self, views: Tensor, indices: Tensor) -> Tensor:
        """Views [B] and indices [B] of images (int64) -> features [B, N, C] fp32."""
        rows = []
        for view, index in zip(views.tolist(), indices.tolist(), strict=True):
            first = index - index % IMAGES_A_FILE
            rows.append(torch.from_numpy(self.parts[view, first][index - first].copy()))
        return torch.stack(rows).to(self.device).float()

    def _file(self, view: int, first: int) -> Path:
        return self.folder / f"view{view}_images{first:07d}.npy"

    def _compute(
        self,
        starts: list[tuple[int, int]],
        dataset: ImageFolder,
        teacher: Teacher,
        world: World,
        batch_size: int,
        workers: int,
    ) -> None:
        if not starts:
            return
        from tqdm import tqdm

        keys = [[(v, i) for i in range(first, min(first + IMAGES_A_FILE, self.images))] for v, first in starts]
        total = sum(map(len, keys))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tqdm(total=total, desc="teacher", unit="image", disable=world.rank != 0, dynamic_ncols=True) as bar:
                for start, part in zip(starts, keys, strict=True):
                    rows = []
                    for batch in keyed_loader(dataset, part, batch_size, workers):
                        rows.append(teacher(batch["image"].to(world.device)).half().cpu())
                        bar.update(len(rows[-1]))
                    _save(torch.cat(rows), self._file(*start))
        except OSError as error:
            raise UserError(
                f"the teacher's features could not be written to {self.folder}: {error}. Make room and start the same "
                "command again, which computes only what is missing, or use fewer --views (0: nothing is kept)."
            ) from error


def _save(features: Tensor, file: Path) -> None:
    """As .npy, under another name until everything is on disk."""
    import numpy as np

    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        np.save(stream, features.numpy())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
