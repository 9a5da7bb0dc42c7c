"""Which files of a folder are images, which class each belongs to, and how one is opened whatever its format."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """The images of a folder in a fixed order.

    Attributes:
        root: the folder.
        paths: the files, relative to root with forward slashes, sorted.
        labels: for each path the index of its class; None if the folder has no class folders.
        classes: the names of the class folders, sorted; empty if there are none.
        rejected: (path, reason) of each file that was left out.
    """

    root: Path
    paths: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """A hash of paths and labels: resuming a run on a list with another one would show it other images."""
        content = json.dumps([self.paths, self.labels]).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def find_images(root: str | Path, split: str | None = None) -> ImageList:
    """Lists the image files below `root/split` if that folder exists, else below `root`, by their names alone.

    The folders of the first level are the classes, unless there are images beside them. Links are followed only to
    files inside the folder. Hidden files and folders are passed over, and so are files with another suffix than
    `SUFFIXES`.

    Raises:
        DataError: the folder is missing, is no folder, or holds no image file.
    """
    root = Path(root)
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


def open_image(path: str | Path) -> Image.Image:
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
