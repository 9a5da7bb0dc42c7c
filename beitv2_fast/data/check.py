"""Decodes every image once before a training starts, so that a damaged file does not end it hours later."""

import functools
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import DataError, first_few, first_lines, require
from ..runs.files import write_atomically
from .forks import by_processes
from .images import ImageList

CACHE_VERSION = 1
FILES_PER_TASK = 16
FILES_BETWEEN_SAVES = 20_000

_log = logging.getLogger(__name__)


def check_images(images: ImageList, *, cache: Path | None, min_size: int, workers: int) -> ImageList:
    """Decodes every file once and leaves out those that cannot be trained on.

    Left out are unreadable, truncated and empty files, files that are no images, images whose shorter side is below
    ``min_size`` pixels, and such of more than PIL's limit of pixels (decompression bombs). The first ones and their
    number are logged when they are found.

    Args:
        images: what ``find_images`` returned.
        cache: a JSON file for the result, so that a restart decodes only what has changed (by path, size and
            modification time); None: no file.
        min_size: the least width and height in pixels.
        workers: processes that decode; 0: this one.

    Returns:
        the list without the files that were left out, which are added to ``rejected``, and with the images' sizes.

    Raises:
        DataError: nothing is left.
    """
    known = _read_cache(cache, images.root)
    states = file_states(images)
    todo = [i for i, path in enumerate(images.paths) if states[i] is None or known.get(path, [None])[0] != states[i]]
    found = {
        path: known[path]
        for path, state in zip(images.paths, states, strict=True)
        if path in known and known[path][0] == state
    }
    try:
        for count, (i, width, height, error) in enumerate(_decode_all(images, todo, workers), 1):
            found[images.paths[i]] = [states[i], width, height, error]
            if count % FILES_BETWEEN_SAVES == 0:
                _write_cache(cache, images.root, found)
    finally:  # also when interrupted: the next start goes on from here
        if todo:
            _write_cache(cache, images.root, found)

    bad = {}
    for path, (_, width, height, error) in found.items():
        if error is not None:
            bad[path] = error
        elif min(width, height) < min_size:
            bad[path] = f"too small: {width}x{height} pixels, needed {min_size}x{min_size}"
    images = replace(images, sizes=[(found[path][1], found[path][2]) for path in images.paths])
    return _without(images, bad, listed=bool(todo) or cache is None)


def _without(images: ImageList, bad: dict[str, str], *, listed: bool) -> ImageList:
    rejected = images.rejected + [(path, bad[path]) for path in images.paths if path in bad]
    keep = [i for i, path in enumerate(images.paths) if path not in bad]
    total = len(images.paths) + len(images.rejected)
    lines = [first_lines([f"{path}: {reason}" for path, reason in rejected])] if rejected else []
    labels = images.labels or []
    lost = [images.classes[i] for i in sorted({*labels} - {labels[i] for i in keep if labels})]
    if lost and keep:
        lines.append(f"  so that no image is left of the classes {first_few(lost, 10)}")
    if not keep:
        raise DataError(
            f"None of the {total} files in {images.root} can be used:\n" + "\n".join(lines) + "\n"
            "Repair or replace them, or pass another folder (smaller images need a preset with a smaller image size)."
        )
    if rejected and listed:
        _log.warning("%d of %d files in %s are left out:\n%s", len(rejected), total, images.root, "\n".join(lines))
    elif rejected:
        _log.info("%d of %d files in %s are left out, as before", len(rejected), total, images.root)
    return images.subset(keep, rejected)


def file_states(images: ImageList) -> list[list[int] | None]:
    """Size and modification time of the file of each image, and its place in a shard; None if the file is gone."""
    stat = functools.cache(_file_state) if images.spans is not None else _file_state
    states = [stat(images.file(i)) for i in range(len(images))]
    if images.spans is None:
        return states
    return [None if state is None else [*state, *span] for state, span in zip(states, images.spans, strict=True)]


def _file_state(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _decode_all(images: ImageList, todo: list[int], workers: int) -> Iterator[tuple[int, int, int, str | None]]:
    if not todo:
        return
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    bar = tqdm(total=len(todo), desc="checking images", unit="image", mininterval=0.5, disable=None)
    tasks = [todo[i : i + FILES_PER_TASK] for i in range(0, len(todo), FILES_PER_TASK)]
    try:
        for result in by_processes(functools.partial(_decode_some, images), tasks, workers):
            bar.update(len(result))
            yield from result
    finally:
        bar.close()


def _decode_some(images: ImageList, indices: list[int]) -> list[tuple[int, int, int, str | None]]:
    results: list[tuple[int, int, int, str | None]] = []
    for i in indices:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                width, height = images.open(i).size
            results.append((i, width, height, None))
        except Exception as error:  # a decoder may raise anything at all on a damaged file
            results.append((i, 0, 0, _reason(images, i, error)))
    return results


def _reason(images: ImageList, index: int, error: Exception) -> str:
    path = images.file(index)
    if not path.is_file():
        return "not a file, or gone"
    if (path.stat().st_size if images.spans is None else images.spans[index][1]) == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_cache(cache: Path | None, root: Path) -> dict[str, list]:
    """-> {path: [[bytes, mtime in ns], width, height, None or the reason to reject it]}; empty if it cannot be used."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or (content.get("version"), content.get("root")) != (CACHE_VERSION, str(root)):
        return {}
    return content["files"]


def _write_cache(cache: Path | None, root: Path, files: dict[str, list]) -> None:
    if cache is None:
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": CACHE_VERSION, "root": str(root), "files": files}
    write_atomically(cache, json.dumps(content, separators=(",", ":")))
