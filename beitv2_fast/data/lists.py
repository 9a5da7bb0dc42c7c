"""Index files: lists of images and their classes, as there are of ImageNet-21k."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError, first_lines
from .images import ImageList
from .names import MAX_CLASSES, is_image, refusal


def find_listed_images(file: Path, *, labeled: bool = False) -> ImageList:
    """The images that a text file lists, relative to the folder that it lies in (itself it may be a link).

    A line has a path, then a tab or a space, then a class; or only a path, whose first folder is the class; or JSON as
    in the reference's lists: {"class": CLASS, "files": [FILE, ...]} lists CLASS/FILE. Classes that are all numbers are
    the labels, others are sorted. The images are sorted by their paths: a folder and a list of it are the same data.

    Args:
        labeled: images without a class are rejected. Else one of them means that none has a class.

    Raises:
        DataError: a line is none of these, or no image can be used.
    """
    root = file.parent.resolve()
    classes: dict[str, str | None] = {}
    rejected: list[tuple[str, str]] = []
    inside: dict[str, bool] = {}  # of each folder, whether it lies in root, wherever links lead
    for path, name in _entries(file):
        why = refusal(path)
        if why is None:
            folder = path.rpartition("/")[0]
            if folder not in inside:
                inside[folder] = (root / folder).resolve().is_relative_to(root)
            linked = os.path.islink(os.path.join(root, path)) and not (root / path).resolve().is_relative_to(root)
            if linked or not inside[folder]:
                why = "a link that leads out of the folder"
            elif path in classes:
                why = f"listed again{'' if classes[path] == name else f', as of class {name}'}"
        if why is None:
            classes[path] = name
        else:
            rejected.append((path, why))
    without = sorted(path for path, name in classes.items() if name is None)
    if labeled and len(without) < len(classes):
        rejected += [(path, "no label: its line names no class") for path in without]
        classes = {path: name for path, name in classes.items() if name is not None}
    if not classes:
        reasons = first_lines([f"{path}: {why}" for path, why in rejected])
        raise DataError(f"{file} lists no image that can be used. Expected paths of images in {root}.\n{reasons}")
    paths, layout = sorted(classes), f"listed by {file.name}"
    chosen = [name for name in map(classes.get, paths) if name is not None]
    if len(chosen) < len(paths):
        return ImageList(root, paths, rejected=rejected, layout=layout)
    names = _in_order({*chosen})
    number = {name: i for i, name in enumerate(names)}
    return ImageList(root, paths, [number[name] for name in chosen], names, rejected, layout=layout)


def _entries(file: Path) -> Iterator[tuple[str, str | None]]:
    """The paths in a list and their classes."""
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield from _entries_of(line.strip())
                number += 1
    except OSError as error:
        raise DataError(f"The list {file} cannot be read ({error}). Check the path.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(
            f"{file} is not understood after line {number} ({type(error).__name__}: {error}). Expected the path of "
            'an image; this, a tab and its class; or {"class": CLASS, "files": [FILE, ...]}.'
        ) from error


def _entries_of(line: str) -> list[tuple[str, str | None]]:
    if line.startswith("{"):
        entry = json.loads(line)
        return [(f"{entry['class']}/{name}", str(entry["class"])) for name in entry["files"]]
    if is_image(line):
        return [(line, line.split("/", 1)[0] if "/" in line else None)]
    path, name = line.rsplit("\t" if "\t" in line else None, 1) if line else ("", None)
    if line and not is_image(path):
        raise ValueError(f"{line[:80]!r} is no path of an image, then a class")
    return [(path.rstrip(), name)] if line else []


def _in_order(names: set[str]) -> list[str]:
    """The classes by their labels: numbers are these, as in tar shards, and names are sorted."""
    if all(name.isascii() and name.isdigit() and len(name) < 8 and int(name) < MAX_CLASSES for name in names):
        numbers = [str(i) for i in range(max(map(int, names)) + 1)]
        if names <= {*numbers}:  # 01 and 1 are two names
            return numbers
    return sorted(names)
