"""The teacher's features, computed once for a fixed number of views of every image and kept in files.

The teacher is the larger part of a tokenizer's step. With ``views = V`` an image is seen in V random crops in turn, so
that after the first pass over them the teacher has nothing left to do. Files are named by what is in them (teacher,
weights, crops, the images' bytes), so several runs may share a folder, also at the same time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.forks import by_processes, processes_for
from ..data.images import ImageFolder, ImageList
from ..data.loaders import batch_loader
from ..data.stored import room
from ..distributed import World
from ..errors import DataError, UserError, require
from ..runs.files import atomically, write_atomically

IMAGES_PER_FILE = 512
FORMAT = 2  # of the files and of their names
STALE = 3600.0  # seconds after which a file that is being written is taken to be abandoned

Part = tuple[int, int]  # view, first image


class TeacherFeatures:
    """Features [B, N, C] by (view, index), read from files of fp16 that are mapped into memory.

    On a GPU with room for them (``data.stored.room``) all lie in its memory: a batch of 512 images at 64 patches has
    84 MB of an EfficientNet's features, which would take longer to gather and send than to learn from.

    A file holds a view of ``IMAGES_PER_FILE`` images. It is written under another name, flushed and renamed, so whoever
    finds it finds all of it; one that is damaged (header or size) is computed again. Two runs that fill a folder at the
    same time begin at different files and take over what the other one has finished.

    Args:
        folder: where the files are or will be; other runs may use it too.
        dataset: the views that the teacher sees; ``dataset.views`` of every image.
        teacher: images [B, 3, S, S] in [0, 1] -> features [B, N, C], on ``world.device``.
        shape: (N, C) of an image's features.
        identity: what else the features depend on, as JSON types: "teacher", its name;
            the hash of its weights; the grid; the precision.
        memo: a file that remembers the hashes of the images' bytes, by size and modification time; None: no file.

    Raises:
        UserError: the folder cannot be written, or lacks the room; features beyond fp16's range.
    """

    def __init__(
        self,
        folder: Path,
        dataset: ImageFolder,
        teacher: Callable[[Tensor], Tensor],
        world: World,
        *,
        shape: tuple[int, int],
        identity: dict[str, Any],
        memo: Path | None = None,
        batch_size: int = 32,
        workers: int = 0,
    ):
        require("numpy", "train", "Keeping the teacher's features")
        # The pixels of one crop stand for all code between a file and the teacher: seed, cropping, decoder.
        pixels = torch.as_tensor(dataset[0, 0]["image"]).contiguous().numpy().tobytes()
        key = [FORMAT, identity, dataset.seed, repr(dataset.view), hashlib.sha256(pixels).hexdigest()]
        name = re.sub(r"[^\w.@-]+", "_", str(identity["teacher"]))
        self.folder = folder / f"{name}-{_short_hash(key)}"
        self.images, self.shape = len(dataset), shape
        contents = world.from_rank_0(lambda: content_hashes(dataset.images, memo))
        self.files = {
            (view, first): self.folder / f"view{view}_images{first:07d}_{contents[first]}.npy"
            for view in range(dataset.views)
            for first in range(0, self.images, IMAGES_PER_FILE)
        }
        missing = [part for part in list(self.files)[world.rank :: world.size] if self._read(part) is None]
        self._compute(missing, dataset, teacher, world, batch_size, workers)
        world.barrier()
        self.parts: dict[Part, Any] = {}
        for part, file in self.files.items():
            self.parts[part] = self._read(part)
            if self.parts[part] is None:
                raise UserError(f"{file} was there and is damaged now. Start the same command again.")
        self.device = world.device
        fits = self.device.type == "cuda" and sum(p.nbytes for p in self.parts.values()) <= room(self.device)
        self.on_device = self.stacked(self.device) if fits else None

    def stacked(self, device: torch.device) -> Tensor:
        """All features on a device, fp16 [views * images, N, C], view after view."""
        import numpy as np

        count = sum(map(len, self.parts.values()))
        found = torch.empty(count, *self.shape, dtype=torch.float16, device=device)
        for (view, first), part in self.parts.items():
            row = view * self.images + first
            found[row : row + len(part)] = torch.from_numpy(np.array(part))
        return found

    def __call__(self, views: Tensor, indices: Tensor) -> Tensor:
        """Views [B] and indices [B] of images (int64) -> features [B, N, C] fp32."""
        if self.on_device is not None:
            rows = (views * self.images + indices).to(self.device, non_blocking=True)
            return self.on_device[rows].float()
        import numpy as np

        found = []
        for view, index in zip(views.tolist(), indices.tolist(), strict=True):
            first = index - index % IMAGES_PER_FILE
            found.append(self.parts[view, first][index - first])
        # numpy's stack: torch's is an op that autocast to bf16 on a CPU refuses for fp16.
        return torch.from_numpy(np.stack(found)).to(self.device, non_blocking=True).float()

    def _count(self, part: Part) -> int:
        """Images in a part."""
        return min(IMAGES_PER_FILE, self.images - part[1])

    def _read(self, part: Part) -> Any:
        """The features of a part, mapped into memory; None if the file is missing, cut, or not what it should be."""
        import numpy as np

        try:
            features = np.load(self.files[part], mmap_mode="r", allow_pickle=False)
            size = self.files[part].stat().st_size
        except (OSError, ValueError, EOFError):
            return None
        whole = features.dtype == np.float16 and features.shape == (self._count(part), *self.shape)
        return features if whole and size == features.offset + features.nbytes else None

    def _compute(
        self, parts: list[Part], dataset: ImageFolder, teacher: Callable, world: World, batch_size: int, workers: int
    ) -> None:
        if not parts:
            return
        from tqdm import tqdm

        begin = uuid.uuid4().int % len(parts)  # elsewhere than another run that fills the folder
        total = sum(map(self._count, parts))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self._check_room(total)
            bar = tqdm(total=total, desc="teacher", unit="image", disable=world.rank != 0 or None, dynamic_ncols=True)
            with bar, ThreadPoolExecutor(1) as writer:  # while the next ones are computed
                batches = [keys for part in parts[begin:] + parts[:begin] for keys in self._batches(part, batch_size)]
                rows: list[Tensor] = []
                written: Future[None] | None = None
                # One loader for all files: its processes would take longer to start than to load the images of one.
                for keys, batch in zip(batches, batch_loader(dataset, batches, batch_size, workers), strict=True):
                    part = keys[0][0], keys[0][1] - keys[0][1] % IMAGES_PER_FILE
                    bar.update(len(keys))
                    if not rows and self._read(part) is not None:  # by another run
                        continue
                    rows.append(teacher(batch["image"].to(world.device)).half().cpu())
                    if sum(map(len, rows)) == self._count(part):
                        if written is not None:
                            written.result()
                        written = writer.submit(_save, _finite(torch.cat(rows)), self.files[part])
                        rows = []
                if written is not None:
                    written.result()
        except OSError as error:
            raise UserError(
                f"the teacher's features could not be written to {self.folder}: {error}. Make room and start the same "
                "command again, which computes only what is missing; or give a --teacher-cache on another disk, or use "
                "fewer --views (0: nothing is kept)."
            ) from error

    def _batches(self, part: Part, size: int) -> list[list[Part]]:
        """The keys (view, image) of a part, in batches."""
        keys = [(part[0], part[1] + i) for i in range(self._count(part))]
        return [keys[first : first + size] for first in range(0, len(keys), size)]

    def _remove_stale(self) -> None:
        """What killed processes left half written."""
        for file in self.folder.glob(".*.npy.*"):
            if time.time() - file.stat().st_mtime > STALE:
                file.unlink(missing_ok=True)

    def _check_room(self, images: int) -> None:
        """A full disk is told now, not after hours."""
        needed, free = 2 * images * self.shape[0] * self.shape[1], shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"they need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def content_hashes(images: ImageList, memo: Path | None) -> dict[int, str]:
    """For the first image of each part, a hash of the bytes of all images in it.

    Files are read once: with a ``memo`` only those parts are read again in which a path, size or time has changed.
    """
    known = {}
    if memo is not None and memo.is_file():
        try:
            known = dict(json.loads(memo.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}  # damaged: read the images
    starts = range(0, len(images), IMAGES_PER_FILE)
    states = {first: _short_hash([_state(images, i) for i in _members(images, first)]) for first in starts}
    todo = [first for first in starts if states[first] not in known]
    hashes = by_processes(functools.partial(_hash_files, images), todo, processes_for(len(images)))
    known.update(zip((states[f] for f in todo), hashes, strict=True))
    if todo and memo is not None:
        write_atomically(memo, json.dumps({states[first]: known[states[first]] for first in starts}))
    return {first: known[states[first]] for first in starts}


def _members(images: ImageList, first: int) -> range:
    return range(first, min(first + IMAGES_PER_FILE, len(images)))


def _state(images: ImageList, index: int) -> tuple[str, int, int, int]:
    file = images.file(index)
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"The image {file} has gone ({error}). Put it back, or start again.") from error
    first = 0 if images.spans is None else images.spans[index][0]  # byte of a shard
    return str(file), stat.st_size, stat.st_mtime_ns, first


def _hash_files(images: ImageList, first: int) -> str:
    whole = hashlib.sha256()
    for index in _members(images, first):
        try:
            whole.update(hashlib.sha256(images.read(index)).digest())
        except OSError as error:
            raise DataError(f"The image {images.paths[index]} cannot be read now ({error}). Put it back.") from error
    return whole.hexdigest()[:16]


def _short_hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise UserError(
            "the teacher's features are not finite, or beyond the range of fp16 (65504) in which they are kept. Check "
            "its weights, choose another layer, or use --views 0, which keeps nothing."
        )
    return features


def _save(features: Tensor, file: Path) -> None:
    """As .npy, under another name until everything is on disk; a failure leaves nothing."""
    from numpy.lib import format as npy

    array = features.contiguous().numpy()

    def write(temporary: Path) -> None:
        with temporary.open("xb") as stream:
            npy.write_array_header_1_0(stream, npy.header_data_from_array_1_0(array))
            stream.write(array.data)  # np.save would write through another stream and lose its error on a full disk

    atomically(file, write)
