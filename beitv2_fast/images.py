"""Which files are images, which class each belongs to, and how one is read and opened whatever its format."""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import UserError, require

require("PIL", "train", "Reading images")

from PIL import Image, ImageOps  # noqa: E402

SUFFIXES = (".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg")
SUFFIXES += (".jpf", ".jpg", ".jpx", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff")
SUFFIXES += (".webp",)
SPLITS = {  # whatever their case, and what SPLIT_ENDS may follow
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
SPLIT_ENDS = re.compile(r"[-_ ]?(set|data|dataset|images|imgs|img|split)?[-_ ]?\d*")  # of training_set and train2017
# Beginnings of the names of folders that systems and programs leave in data sets, thumbnails in some of them.
SYSTEM_FOLDERS = ("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found", "paxheaders")
SYSTEM_FOLDERS += ("system volume information", "__pycache__")
EXIF_ORIENTATION = 0x0112
LISTED = 6  # kinds of files that are passed over

PassedOver = dict[str, tuple[int, str]]  # by kind, such as "files ending in .txt": how many, and the first one's name


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
        passed_over: what else lies there.
    """

    root: Path
    paths: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None
    passed_over: PassedOver = field(default_factory=dict)

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
    def summary(self) -> str:
        """One line: how many images of which classes, in which layout, and what was passed over."""
        from .shards import shared_keys

        names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        classes = f"{len(self.classes):,} classes ({names})" if self.classes else "no classes"
        if self.spans is None:
            layout, more = "class folders" if self.classes else "folder", ""
        else:
            layout, more = "tar shards", shared_keys(self.paths)
        return f"found {len(self):,} images, {classes}, {layout} in {self.root}{more}{told(self.passed_over)}"

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


def find_images(
    root: str | Path, split: str | None = None, *, labelled: bool = False, index: Path | None = None
) -> ImageList:
    """Lists the image files of a split of a data set, or with `split` None all below `root`, by their names alone.

    A split is the folder `root/split` in any of its usual spellings (`SPLITS`), or the shards in `root` that are named
    so, or all of `root` where nothing is named as a split. If .tar files lie there, or `root` is one or a pattern of
    such, their images are meant: see `beitv2_fast.shards`; `index` is where the places of the images in them are kept.

    The folders of the first level that have images are the classes, unless there are images beside them. Links are
    followed only to files inside the folder. Passed over, and counted, are hidden files and folders, those that systems
    leave (`SYSTEM_FOLDERS`), files with another suffix than `SUFFIXES`, and the other splits wherever a folder has one
    of the split's name.

    Args:
        split: "train", "val", "test", or the name of another folder; None: `root` is taken as it is.
        labelled: classes are needed, so images without one are rejected by name. Else such images are kept, and the
            list has no classes.

    Raises:
        DataError: the folder is missing, is no folder, or holds no image file; it has splits, but not this one; or more
            than one folder, or as many shards as folders of images, might be meant.
    """
    from .shards import find_shard_images, shards_of

    root = Path(root)
    if not root.is_dir():
        shards = shards_of(root)
        if shards:
            return find_shard_images(shards, index, labelled=labelled)
        raise DataError(
            f"{root} is a file, but a folder with images in it is needed. Pass the folder that it lies in."
            if root.exists()
            else f"The image folder {root} does not exist. Check the path: it should be a folder with images in it."
        )
    folder, shards, beside = _place(root.resolve(), split)
    if shards:
        return find_shard_images(shards, index, labelled=labelled, beside=beside)
    return _list_folder(folder, split, labelled, beside)


def split_of(name: str) -> str | None:
    """The split that a folder's name means, whatever its case: "train", "val", "test"; None if it is another name."""
    for split, names in SPLITS.items():
        for spelling in names:
            if name.lower().startswith(spelling) and SPLIT_ENDS.fullmatch(name.lower(), len(spelling)):
                return split
    return None


def is_left_over(name: str) -> bool:
    """Whether a file or folder is hidden, or something that a system leaves beside the images."""
    return name.startswith(".") or name.lower().startswith(SYSTEM_FOLDERS)


def splits_in(root: Path) -> dict[str, list[str]]:
    """The names of the folders and shards in root that are named as a split, sorted, by split."""
    from .shards import split_of_shard

    found: dict[str, list[str]] = {}
    with os.scandir(root) if root.is_dir() else nullcontext(()) as entries:
        for entry in entries:
            split = split_of(entry.name) if entry.is_dir() else split_of_shard(entry.name)
            if split is not None:
                found.setdefault(split, []).append(entry.name)
    return {split: sorted(names) for split, names in sorted(found.items())}


def find_split(root: Path, *splits: str) -> str | None:
    """The first of these splits that root has."""
    found = splits_in(root)
    return next((split for split in splits if split in found), None)


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split in root; None if there is none.

    Raises:
        DataError: several have one of its names, and none is `split` itself.
    """
    if Path(split).name != split or split == "..":
        raise DataError(f"The split {split!r} is not the name of a folder in {root}; expected a name such as 'train'.")
    names = [name for name in splits_in(root).get(split, [split]) if (root / name).is_dir()]
    if len(names) > 1 and split not in names:
        raise DataError(
            f"{root} has several folders that may be meant by {split}: {', '.join(names)}. Pass the one that is meant, "
            f"or name it {split}."
        )
    return root / (split if split in names else names[0]) if names else None


def _place(root: Path, split: str | None) -> tuple[Path, list[Path], PassedOver]:
    """The folder that a split lies in, its shards, if it consists of such, and what lies beside these or the folder."""
    from .shards import shards_in

    folder = None if split is None else split_folder(root, split)
    if folder is not None and not folder.resolve().is_relative_to(root):
        raise DataError(
            f"{folder} is a link that leads out of {root}. Pass the folder it points at: {folder.resolve()}"
        )
    if folder is not None:
        beside = counted(
            (entry.name, f"folders and images beside {folder.name}")
            for entry in os.scandir(root)
            if not is_left_over(entry.name) and entry.name != folder.name and (entry.is_dir() or _is_image(entry.name))
        )
        shards, more = shards_in(folder.resolve())
        return folder.resolve(), shards, {**beside, **more}
    shards, beside = shards_in(root)
    named = {} if split is None else splits_in(root)
    others = [name for other, names in named.items() if other != split for name in names]
    if not others:
        return root, shards, beside
    if split not in named or not shards:
        raise DataError(
            f"{root} has {', '.join(others[:5])}, but nothing for {split} (it may be named "
            f"{', '.join(SPLITS.get(split, [split]))}). Name the images for {split} so (if these are classes: put all "
            "into a folder of that name), or pass the very folder or shards that are meant."
        )
    own = [path for path in shards if path.name in named[split]]
    return root, own, {**beside, **counted((path.name, "other shards") for path in shards if path not in own)}


def has_images(entry: os.DirEntry) -> bool:
    """Whether it is an image file, or a folder with one somewhere in it."""
    if is_left_over(entry.name):
        return False
    if entry.is_dir(follow_symlinks=False):
        return any(why is kind is None for _, why, kind in _walk(Path(entry.path), Path(entry.path), None))
    return _is_image(entry.name)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _list_folder(folder: Path, split: str | None, labelled: bool, beside: PassedOver) -> ImageList:
    paths, rejected, others = [], [], []
    for path, why, kind in _walk(folder, folder, split):
        if kind is not None:
            others.append((path, kind))
        elif why is not None:
            rejected.append((path, why))
        else:
            paths.append(path)
    if not paths:
        left_out = f" ({len(rejected)} links were not followed, such as {rejected[0][0]})" if rejected else ""
        raise DataError(
            f"The folder {folder} holds no images{left_out}{told(counted(others))}. Expected files ending in "
            f"{' '.join(SUFFIXES)}, directly or in one folder a class. Put images there or pass another folder."
        )
    paths.sort()
    classes = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    passed = {path for path, _ in others}
    empty = {entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)} - {*classes, *passed}
    passed_over = {**beside, **counted([*others, *((name, "folders without images") for name in empty)])}
    loose = [path for path in paths if "/" not in path]
    if all(map(split_of, classes)) or (loose and not labelled):  # splits that are read together are no classes
        return ImageList(folder, paths, rejected=rejected, passed_over=passed_over)
    rejected += [(path, "no label: it lies in no class folder") for path in loose]
    paths = [path for path in paths if "/" in path]
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[path.split("/", 1)[0]] for path in paths]
    return ImageList(folder, paths, labels, classes, rejected, passed_over=passed_over)


def _walk(folder: Path, root: Path, split: str | None) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields (path relative to root, why it is rejected, the kind of what is passed over) of all that lies below
    folder; None twice of an image."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if is_left_over(entry.name):
                yield name, None, "hidden files and what systems leave"
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_dir():
                yield name, "a link to a folder, which is not followed", None
            elif _is_image(entry.name):
                outside = entry.is_symlink() and not path.resolve().is_relative_to(root)
                yield name, "a link that leads out of the folder" if outside else None, None
            else:
                yield name, None, f"files ending in {path.suffix.lower()}" if path.suffix else "files without a suffix"
    splits = {split_of(path.name) for path in folders}
    for path in folders:
        if split is not None and split in splits and split_of(path.name) not in (None, split):
            yield path.relative_to(root).as_posix(), None, "folders of other splits"
        else:
            yield from _walk(path, root, split)


def counted(others: Iterable[tuple[str, str]]) -> PassedOver:
    """(Name, kind) of each -> by kind how many there are and the first one's name."""
    found: dict[str, tuple[int, str]] = {}
    for name, kind in others:
        count, first = found.get(kind, (0, name))
        found[kind] = count + 1, min(first, name)
    return dict(sorted(found.items()))


def told(passed_over: PassedOver) -> str:
    """The end of a line of the log: what was passed over, the most frequent kinds first; nothing if nothing was."""
    kinds = sorted(passed_over.items(), key=lambda item: -item[1][0])
    listed = [f"{count:,} {kind} ({first}{', ...' if count > 1 else ''})" for kind, (count, first) in kinds[:LISTED]]
    more = [f"{len(kinds) - LISTED} more kinds"] if len(kinds) > LISTED else []
    return "; passed over: " + ", ".join(listed + more) if kinds else ""


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
