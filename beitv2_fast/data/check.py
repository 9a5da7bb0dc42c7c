"""Looks at every image once before a training starts, so that a damaged file does not end it hours later."""

import functools
import itertools
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..distributed import ONE, World
from ..errors import DataError, first_few, first_lines, require
from ..runs.files import flush
from .forks import by_processes
from .images import ImageList

CACHE_VERSION = 2
IMAGES_PER_TASK = 16
IMAGES_PER_ROUND = 512  # of each rank, until it hears of the others'

Entry = list  # of an image: [_states, how it was checked, width, height, None or the reason to reject it]

_log = logging.getLogger(__name__)


def check_images(
    images: ImageList,
    *,
    cache: Path | None,
    min_size: int,
    workers: int,
    how: str = "decode",
    world: World = ONE,
) -> ImageList:
    """Looks at every file once and leaves out those that cannot be trained on. The ranks share the work.

    Left out are unreadable, truncated and empty files, files that are no images, images whose shorter side is below
    ``min_size`` pixels, and such of more than PIL's limit of pixels (decompression bombs). The first ones and their
    number are logged when they are found.

    Args:
        images: what ``find_images`` returned, the same on all ranks.
        cache: a file for the results, which all ranks read and rank 0 writes, a line per image and as they come, so
            that a restart looks only at what is missing or has changed (by path, size and modification time). None: no
            file.
        min_size: the least width and height in pixels.
        how: "decode" finds all that; "header" reads only sizes, and so misses files that are cut or damaged after
            their header; "none" reads nothing: all images stay, without sizes.
        workers: processes of each rank; 0: only this one.

    Returns:
        the list without the files that were left out, which are added to ``rejected``, and with the images' sizes.

    Raises:
        DataError: nothing is left.
    """
    if how == "none":
        return images
    known = _read_cache(cache, images.root)
    if cache is not None and world.rank == 0 and not known:
        _start_cache(cache, images.root)
    found: dict[str, Entry] = {}
    fresh = 0
    for part in _look_at_all(images, how, known, workers, world):
        new = [(path, entry) for path, entry in part if known.get(path) != entry]
        if cache is not None and world.rank == 0 and new:
            _add_to_cache(cache, new)
        found.update(part)
        fresh += len(new)
    if cache is not None and world.rank == 0 and fresh:
        flush(cache)

    bad = {}
    for path, (_, _, width, height, error) in found.items():
        if error is not None:
            bad[path] = error
        elif min(width, height) < min_size:
            bad[path] = f"too small: {width}x{height} pixels, needed {min_size}x{min_size}"
    images = replace(images, sizes=[tuple(found[path][2:4]) for path in images.paths])
    return _without(images, bad, listed=world.rank == 0 and (fresh > 0 or cache is None))


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


def file_states(images: ImageList, indices: Sequence[int] | None = None) -> list[list[int] | None]:
    """Size and modification time of the file of each image, and its place in a shard; None if the file is gone."""
    stat = functools.cache(_file_state) if images.spans is not None else _file_state
    indices = range(len(images)) if indices is None else indices
    states = [stat(images.file(i)) for i in indices]
    if images.spans is None:
        return states
    return [None if s is None else [*s, *images.spans[i]] for i, s in zip(indices, states, strict=True)]


def _file_state(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _look_at_all(
    images: ImageList, how: str, known: dict[str, Entry], workers: int, world: World
) -> Iterator[list[tuple[str, Entry]]]:
    """The entries of all images by path, round after round: in each, every rank looks at its share, and all hear of it.

    Their processes do not wait for that: they are ahead.
    """
    per_round = IMAGES_PER_ROUND * world.size
    shares = [range(len(images))[i : i + per_round][world.rank :: world.size] for i in range(0, len(images), per_round)]
    tasks = [
        [(i, known.get(images.paths[i])) for i in share[first : first + IMAGES_PER_TASK]]
        for share in shares
        for first in range(0, len(share), IMAGES_PER_TASK)
    ]
    results = by_processes(functools.partial(_look_at_some, images, how), tasks, min(workers, len(tasks)))
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    with tqdm(total=len(images), desc="checking images", unit="image", delay=1, disable=world.rank > 0 or None) as bar:
        for share in shares:
            own = itertools.islice(results, -(-len(share) // IMAGES_PER_TASK))
            every = world.gather_objects([entry for task in own for entry in task])
            part = [(images.paths[i], entry) for of_rank in every for i, entry in of_rank]
            bar.update(len(part))
            yield part


def _look_at_some(images: ImageList, how: str, task: list[tuple[int, Entry | None]]) -> list[tuple[int, Entry]]:
    """Of (index, what is known of the image) the entries: the known one, if the file is still the one that it is of."""
    states = file_states(images, [i for i, _ in task])
    entries: list[tuple[int, Entry]] = []
    for (i, before), state in zip(task, states, strict=True):
        if before is None or state is None or before[0] != state or before[1] not in (how, "decode"):
            before = [state, how, *_look(images, i, how)]
        entries.append((i, before))
    return entries


def _look(images: ImageList, index: int, how: str) -> tuple[int, int, str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return *(images.open(index).size if how == "decode" else images.header(index)), None
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        return 0, 0, reason_to_reject(images, index, error)


def reason_to_reject(images: ImageList, index: int, error: Exception) -> str:
    """In a few words, why an image that raised this error when it was read is left out."""
    path = images.file(index)
    if not path.is_file():
        return "not a file, or gone"
    if (path.stat().st_size if images.spans is None else images.spans[index][1]) == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    return " ".join(str(error).replace(f"{images.root}{os.sep}", "").split())[:200] or type(error).__name__


def _read_cache(cache: Path | None, root: Path) -> dict[str, Entry]:
    """The entries by path; empty if it cannot be used. The last line of a path counts; one that was cut is no line."""
    try:
        first, *lines = cache.read_text(encoding="utf-8").splitlines() if cache is not None else [""]
    except (OSError, ValueError):
        return {}
    if first != _first_line(root):
        return {}
    known = {}
    for line in lines:
        with suppress(ValueError, TypeError):
            path, state, how, width, height, error = json.loads(line)
            known[path] = [state, how, width, height, error]
    return known


def _first_line(root: Path) -> str:
    return json.dumps({"version": CACHE_VERSION, "root": str(root)})


def _start_cache(cache: Path, root: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(_first_line(root), encoding="utf-8")


def _add_to_cache(cache: Path, entries: list[tuple[str, Entry]]) -> None:
    with cache.open("a", encoding="utf-8") as file:
        file.write("".join(f"\n{json.dumps([path, *entry], separators=(',', ':'))}" for path, entry in entries))
