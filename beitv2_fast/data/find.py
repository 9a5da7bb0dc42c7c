"""Which files of a folder are its images, in which order, and which are held out."""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from ..errors import DataError
from .arrow import find_arrow_images
from .images import ImageList
from .lists import find_listed_images
from .names import (
    IMAGE_SUFFIXES,
    LIST_SUFFIXES,
    SPLITS,
    PassedOver,
    counted,
    is_image,
    is_left_over,
    is_shard,
    split_of,
    split_of_shard,
    told,
)
from .shards import find_shard_images, shards_of


def find_images(
    root: str | Path, split: str | None = None, *, labeled: bool = False, index: Path | None = None
) -> ImageList:
    """Lists the image files of a split of a data set, or with ``split`` None all below ``root``, only by their names.

    A split is the folder ``root/split`` in any of its usual spellings (``SPLITS``), or the shards in ``root`` that are
    named so, or all of ``root`` where nothing is named as a split. If .tar, .arrow or .parquet files lie there, or
    ``root`` is one or a pattern of such, their images are meant (see ``data.shards``, ``data.arrow``); ``index`` is
    where the places of the images in tar files are kept. A text file lists images (see ``data.lists``).

    The folders of the first level that have images are the classes, unless there are images beside them. Links are
    followed only to files inside the folder. Passed over, and counted, are hidden files and folders, those that systems
    leave (``SYSTEM_FOLDERS``), files with another suffix than ``IMAGE_SUFFIXES``, and the other splits wherever a
    folder has one of the split's name.

    Args:
        split: "train", "val", "test", or the name of another folder; None: ``root`` is taken as it is.
        labeled: classes are needed, so images without one are rejected by name. Else such images are kept, and the
            list has no classes.

    Raises:
        DataError: the folder is missing, is no folder, or holds no image file; it has splits, but not this one; or more
            than one folder, or as many shards as folders of images, might be meant.
    """
    root = Path(root)
    if not root.is_dir():
        shards = shards_of(root)
        if shards:
            return _of_shards(shards, index, labeled)
        if root.is_file() and root.suffix.lower() in LIST_SUFFIXES:
            return find_listed_images(root, labeled=labeled)
        raise DataError(
            f"{root} is a file, but a folder with images in it is needed. Pass the folder that it lies in, or a "
            f"list of images, which ends in {' '.join(LIST_SUFFIXES)}."
            if root.exists()
            else f"The image folder {root} does not exist. Check the path: it should be a folder with images in it."
        )
    folder, shards, beside = _place(root.resolve(), split)
    if shards:
        return _of_shards(shards, index, labeled, beside)
    return _list_folder(folder, split, labeled, beside)


def _of_shards(shards: list[Path], index: Path | None, labeled: bool, beside: PassedOver | None = None) -> ImageList:
    kinds = {path.suffix for path in shards}
    if len(kinds) > 1:
        raise DataError(
            f"{shards[0].parent} has files ending in {' and in '.join(sorted(kinds))}: it is not clear which are "
            f"meant. Pass the ones, such as '{shards[0].parent}/*{shards[0].suffix}'."
        )
    if kinds == {".tar"}:
        return find_shard_images(shards, index, labeled=labeled, beside=beside)
    return find_arrow_images(shards, labeled=labeled, beside=beside)


def splits_in(root: Path) -> dict[str, list[str]]:
    """The names of the folders and shards in root that are named as a split, sorted, by split."""
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
        DataError: several have one of its names, and none is ``split`` itself.
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
    folder = None if split is None else split_folder(root, split)
    if folder is not None and not folder.resolve().is_relative_to(root):
        raise DataError(
            f"{folder} is a link that leads out of {root}. Pass the folder it points at: {folder.resolve()}"
        )
    if folder is not None:
        beside = counted(
            (entry.name, f"folders and images beside {folder.name}")
            for entry in os.scandir(root)
            if not is_left_over(entry.name) and entry.name != folder.name and (entry.is_dir() or is_image(entry.name))
        )
        shards, more = shards_in(folder.resolve())
        return folder.resolve(), shards, {**beside, **more}
    shards, beside = shards_in(root)
    named = {} if split is None else splits_in(root)
    others = [name for other, names in named.items() if other != split for name in names]
    if split is None or not others:
        return root, shards, beside
    if split not in named or not shards:
        raise DataError(
            f"{root} has {', '.join(others[:5])}, but nothing for {split} (it may be named "
            f"{', '.join(SPLITS.get(split, [split]))}). Name the images for {split} so (if these are classes: put all "
            "into a folder of that name), or pass the very folder or shards that are meant."
        )
    own = [path for path in shards if path.name in named[split]]
    return root, own, {**beside, **counted((path.name, "other shards") for path in shards if path not in own)}


def shards_in(folder: Path) -> tuple[list[Path], PassedOver]:
    """The shards of a folder and the images that lie beside them; none if these are more, and so are meant.

    Raises:
        DataError: as many shards as image files and folders with images.
    """
    shards = sorted(path for path in folder.iterdir() if is_shard(path.name) and path.is_file())
    images = sorted(entry.name for entry in os.scandir(folder) if has_images(entry)) if shards else []
    if shards and len(images) == len(shards):
        raise DataError(
            f"{folder} holds as many {shards[0].suffix} files ({shards[0].name}, ...) as folders and files of images "
            f"({images[0]}, ...): it is not clear which are meant. Move the ones away, or for the shards pass "
            f"'{folder}/*{shards[0].suffix}'."
        )
    if len(images) > len(shards):
        return [], {}
    return shards, counted((name, "folders and images beside the shards") for name in images)


def has_images(entry: os.DirEntry) -> bool:
    """Whether it is an image file, or a folder with one somewhere in it."""
    if is_left_over(entry.name):
        return False
    if entry.is_dir(follow_symlinks=False):
        return any(why is kind is None for _, why, kind in _walk(Path(entry.path), Path(entry.path), None))
    return is_image(entry.name)


def _list_folder(folder: Path, split: str | None, labeled: bool, beside: PassedOver) -> ImageList:
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
            f"{' '.join(IMAGE_SUFFIXES)}, directly or in one folder per class. Put images there or pass another folder."
        )
    paths.sort()
    classes = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    passed = {path for path, _ in others}
    empty = {entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)} - {*classes, *passed}
    passed_over = {**beside, **counted([*others, *((name, "folders without images") for name in empty)])}
    loose = [path for path in paths if "/" not in path]
    if all(map(split_of, classes)) or (loose and not labeled):  # splits that are read together are no classes
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
            elif is_image(entry.name):
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


HELD_OUT = ("test", "val")


def held_out_images(data: Path) -> ImageList | None:
    """The images of the split test, or else val; None if there is neither."""
    split = find_split(data, *HELD_OUT)
    return None if split is None else find_images(data, split)


def sample_images(images: ImageList, count: int, seed: int) -> list[int]:
    """Indices of at most ``count`` images, drawn class by class in turn, so that a few show every class; sorted."""
    by_class = defaultdict(list)
    for i in range(len(images)):
        by_class[0 if images.labels is None else images.labels[i]].append(i)
    generator = random.Random(seed)
    for members in by_class.values():
        generator.shuffle(members)
    return sorted(in_turns([by_class[label] for label in sorted(by_class)])[:count])


def in_turns(lists: list[list]) -> list:
    """The first of each list, then the second of each, and so on."""
    return [item for turn in itertools.zip_longest(*lists) for item in turn if item is not None]
