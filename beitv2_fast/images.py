"""Which files are images, which class each belongs to, and how one is read and opened whatever its format."""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import UserError, require

require("PIL", "train", "Reading images")

from PIL import Image, ImageOps  # noqa: E402

SUFFIXES = (".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
SUFFIXES += (".tif", ".tiff", ".webp")
EXIF_ORIENTATION = 0x0112


class DataError(UserError):
    """The images given cannot be used; the message says which and what to do about it."""


@dataclass(frozen=True)
class ImageList:
    """Images in a fixed order: the files of a folder, or members of tar shards.

    Attributes:
        root: the folder.
        paths: the files, relative to root with forward slashes, sorted; of shards SHARD.tar/MEMBER.
        labels: for each path the index of its class; None if there are no classes.
        classes: the names of the classes, sorted; empty if there are none.
        rejected: (path, reason) of each file that was left out.
        spans: of shards, where each image lies: (first byte in the shard, number of bytes); None for a folder.
    """

    root: Path
    paths: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The file that holds the image: its own, or its shard."""
        path = self.paths[index]
        return self.root / (path if self.spans is None else path[: path.index(".tar/") + 4])

    def read(self, index: int) -> bytes:
        """The encoded image. OSError if that cannot be read, or no longer as a whole."""
        if self.spans is None:
            return self.file(index).read_bytes()
        first, length = self.spans[index]
        data = _shard(self.file(index)).read(first, length)
        if len(data) < length:
            raise OSError(f"the shard ends {length - len(data)} bytes too early")
        return data

    def open(self, index: int) -> Image.Image:
        """`open_image` of image `index`; raises what the decoder raises."""
        return open_image(io.BytesIO(self.read(index)))

    def subset(self, indices: list[int], rejected: list[tuple[str, str]] | None = None) -> "ImageList":
        """These images, with the same classes."""
        labels, spans = (None if a is None else [a[i] for i in indices] for a in (self.labels, self.spans))
        rejected = self.rejected if rejected is None else rejected
        return replace(self, paths=[self.paths[i] for i in indices], labels=labels, spans=spans, rejected=rejected)

    @property
    def fingerprint(self) -> str:
        """A hash of paths and labels: resuming a run on a list with another one would show it other images."""
        content = json.dumps([self.paths, self.labels]).encode()
        return hashlib.sha256(content).hexdigest()[:16]


class _Shard:
    """An open shard, closed when nobody reads from it any more. Processes and threads may share it: `pread` moves no
    common position."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, first: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, first)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_shard = functools.lru_cache(maxsize=256)(_Shard)  # opening costs a round trip on network storage


def find_images(root: str | Path, split: str | None = None, *, index: Path | None = None) -> ImageList:
    """Lists the image files below `root/split` if that folder exists, else below `root`, by their names alone.

    If .tar files lie in that folder, or `root` is one or a pattern of such, their images are meant: see
    `beitv2_fast.shards`; `index` is where the places of the images in them are kept.

    The folders of the first level are the classes, unless there are images beside them. Links are followed only to
    files inside the folder. Hidden files and folders are passed over, and so are files with another suffix than
    `SUFFIXES`.

    Raises:
        DataError: the folder is missing, is no folder, or holds no image file.
    """
    from .shards import find_shard_images, shards_of

    root = Path(root)
    shards = shards_of(root, split)
    if shards:
        return find_shard_images(shards, index)
    if not root.exists():
        raise DataError(
            f"The image folder {root} does not exist. Check the path: it should be a folder with images in it."
        )
    if not root.is_dir():
        raise DataError(f"{root} is a file, but a folder with images in it is needed. Pass the folder that it lies in.")
    folder = _split_folder(root.resolve(), split)
    paths, rejected = [], []
    for path, reason in _walk(folder, folder):
        if reason is None:
            paths.append(path)
        else:
            rejected.append((path, reason))
    if not paths:
        left_out = f" ({len(rejected)} links were not followed, such as {rejected[0][0]})" if rejected else ""
        raise DataError(
            f"The folder {folder} holds no images{left_out}. Expected files ending in {' '.join(SUFFIXES)}, "
            "directly or in one folder a class. Put images there or pass another folder."
        )
    paths.sort()
    if any("/" not in path for path in paths):
        return ImageList(folder, paths, rejected=rejected)
    classes = sorted(entry.name for entry in os.scandir(folder) if _is_class_folder(entry))
    index = {name: i for i, name in enumerate(classes)}
    return ImageList(folder, paths, [index[path.split("/", 1)[0]] for path in paths], classes, rejected)


def _split_folder(root: Path, split: str | None) -> Path:
    if split is None:
        return root
    if split in ("", ".", "..") or Path(split).name != split:
        raise DataError(f"The split {split!r} is not the name of a folder in {root}; expected a name such as 'train'.")
    folder = root / split
    if not folder.is_dir():
        return root
    if not folder.resolve().is_relative_to(root):
        raise DataError(
            f"{folder} is a link that leads out of {root}. Pass the folder it points at: {folder.resolve()}"
        )
    return folder.resolve()


def _is_class_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, str | None]]:
    """Yields (path relative to root, None or the reason to leave it out) of what lies below folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(path, root)
            elif entry.is_dir():
                yield name, "a link to a folder, which is not followed"
            elif path.suffix.lower() in SUFFIXES:
                outside = entry.is_symlink() and not path.resolve().is_relative_to(root)
                yield name, "a link that leads out of the folder" if outside else None


def open_image(path: str | Path | io.BytesIO) -> Image.Image:
    """Decodes an image file to 8 bits a channel, turned upright by its EXIF orientation.

    Returns a loaded PIL image in mode "RGB", or "L" if the file is grey (a third of the work for all that follows).
    16-bit grey is scaled by 255 / 65535; palette and CMYK are converted; transparency is dropped.

    Raises:
        OSError, ValueError, SyntaxError, ...: whatever the decoder finds wrong with the file.
    """
    with Image.open(path) as image:
        image.load()
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("RGB", "L"):
            return image
        if image.mode.startswith("I"):
            return _from_16_bit(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
        return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    image = image.convert("I")
    low, high = image.getextrema()
    if low < 0 or high > 65535:
        raise ValueError(f"32-bit pixels from {low} to {high}; save it with 8 or 16 bits (0 .. 65535)")
    return image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
