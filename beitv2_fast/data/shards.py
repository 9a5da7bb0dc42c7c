"""Tar shards in webdataset's layout: KEY.jpg beside KEY.cls or KEY.json, whose members are read in place.

A KEY is a member's whole name without its last suffix: 2024.05.01.png and 2024.05.02.png are two samples. An index
says once where each image lies, so that shards are sampled, shuffled, divided among ranks and resumed as folders are.
Nothing is ever unpacked.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ..errors import DataError, require
from ..runs.files import write_atomically
from .images import ImageList
from .names import (
    IMAGE_SUFFIXES,
    MAX_CLASSES,
    PassedOver,
    counted,
    is_left_over,
    is_shard,
    refusal,
    sample_key,
    short_sample_key,
    told,
)

INDEX_VERSION = 2
SCANNERS = 8  # shards that are scanned at once: on network storage most of the time is waiting
MAX_LABEL_BYTES = 1 << 20
LABEL_SUFFIXES = (".cls", ".json")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of a pattern such as train-{0000..0146}.tar

Member = tuple[str, int, int, int | None, str | None]  # name, first byte, bytes, label, or why it has none
Scanned = tuple[list[Member], list[tuple[str, str]], PassedOver]


def shards_of(root: Path) -> list[Path]:
    """The shards that a path names that is no folder: one of them or a pattern; none if it is something else.

    Raises:
        DataError: a pattern that no file matches.
    """
    text = str(root)
    if root.is_file():
        return [root] if is_shard(root.name) else []
    if RANGE.search(text) or glob.has_magic(text):
        found = sorted({Path(path) for pattern in _ranges(text) for path in glob.glob(pattern)})
        if not found:
            raise DataError(f"No file matches the pattern {text}. Quote it on the command line, and check the folder.")
        return found
    return []


def _ranges(pattern: str) -> Iterator[str]:
    """{0..9} written out, the width of its first number kept."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _ranges(f"{pattern[: match.start()]}{number:0{len(first)}}{pattern[match.end() :]}")


def find_shard_images(
    shards: list[Path], index: Path | None = None, *, labeled: bool = False, beside: PassedOver | None = None
) -> ImageList:
    """The images of the shards, in the order of their names; labels, if every image has one, or they are asked for.

    Members that a careless reader would write elsewhere or stumble over are left out and listed in ``rejected``:
    absolute paths, paths with "..", backslashes or control characters, links, devices, sparse files, names that come
    twice, and what is cut off. Hidden members, and others than images and labels, are passed over.

    Args:
        index: a JSON file that keeps what was found, so that a restart scans only shards that have changed.
        labeled: images without a label are rejected, with the reason. Else one of them means that none has a label.
        beside: what was passed over beside the shards.

    Raises:
        DataError: no shard holds an image.
    """
    root = Path(os.path.commonpath([path.resolve().parent for path in shards]))
    names = [path.resolve().relative_to(root).as_posix() for path in shards]
    known = _read_index(index)
    states = {name: [(root / name).stat().st_size, (root / name).stat().st_mtime_ns] for name in names}
    todo = [name for name in names if known.get(str(root / name), {}).get("state") != states[name]]
    if todo:
        for name, (members, rejected, others) in zip(todo, _scan_all(root, todo), strict=True):
            known[str(root / name)] = {
                "state": states[name], "members": members, "rejected": rejected, "passed_over": others,
            }  # fmt: skip
        _write_index(index, {str(root / name): known[str(root / name)] for name in names})
    return image_list(root, {name: known[str(root / name)] for name in names}, labeled, beside or {})


def image_list(root: Path, scanned: dict[str, dict], labeled: bool, beside: PassedOver) -> ImageList:
    """The list of all shards, of each of which ``scanned`` has what ``scan_shard`` returned."""
    members = [(f"{shard}/{member[0]}", *member[1:]) for shard, found in scanned.items() for member in found["members"]]
    rejected = [
        (f"{shard}/{name}" if name else shard, why) for shard, f in scanned.items() for name, why in f["rejected"]
    ]
    passed_over = dict(beside)
    for shard, found in scanned.items():
        for kind, (count, name) in found["passed_over"].items():
            before, first = passed_over.get(kind, (0, f"{shard}/{name}"))
            passed_over[kind] = before + count, first
    if not members:
        reasons = "".join(f"\n  {name}: {why}" for name, why in rejected[:10])
        raise DataError(
            f"The {len(scanned)} shards in {root} hold no images{told(passed_over)}. Expected tar members such as "
            f"KEY.jpg and KEY.cls, or a column of encoded images.{reasons}"
        )
    without = [
        (name, why or f"no label: there is no {sample_key(name)}.cls")
        for name, _, _, label, why in members
        if label is None
    ]
    any_label = len(without) < len(members)
    if labeled and any_label:
        rejected += without
        members = [member for member in members if member[3] is not None]
    elif without and any_label:
        count, (name, why) = len(members) - len(without), without[0]
        passed_over["labels, since not every image has one"] = count, f"{name}: {why}"
    labels = [label for _, _, _, label, _ in members]
    has_labels = None not in labels
    return ImageList(
        root,
        [name for name, *_ in members],
        labels if has_labels else None,
        [str(i) for i in range(max(labels) + 1)] if has_labels else [],
        rejected,
        [(first, length) for _, first, length, *_ in members],
        passed_over,
    )


def _scan_all(root: Path, names: list[str]) -> Iterator[Scanned]:
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    bar = tqdm(total=len(names), desc="indexing", unit="shard", disable=None)
    with ThreadPoolExecutor(SCANNERS) as pool, bar:
        for result in pool.map(scan_shard, (root / name for name in names)):
            bar.update()
            yield result


def scan_shard(path: Path) -> Scanned:
    """The images of one shard in its order, (member, reason) of what was refused, "" for the shard itself, and what was
    passed over."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int | None]] = {}  # by key what each of its files says
    rejected: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    seen: set[str] = set()
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar):
                why = _refusal(member, size) or ("a name that comes twice" if member.name in seen else None)
                seen.add(member.name)
                suffix = PurePosixPath(member.name).suffix.lower()
                if any(map(is_left_over, PurePosixPath(member.name).parts)) and why is None:
                    others.append((member.name, "hidden members and what systems leave"))
                elif why is not None:
                    rejected.append((member.name, why))
                elif suffix in IMAGE_SUFFIXES:
                    images[member.name] = (member.offset_data, member.size)
                elif member.isreg() and suffix in LABEL_SUFFIXES:
                    content = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset_data)
                    labels.setdefault(sample_key(member.name), {})[member.name] = _label(content)
                elif member.isreg():
                    others.append(
                        (member.name, f"members ending in {suffix}" if suffix else "members without a suffix")
                    )
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        rejected.append(("", f"not an uncompressed tar file as a whole ({error})"))
    found, notes = _with_labels(images, labels)
    return found, rejected, counted([*others, *notes])


def _with_labels(
    images: dict[str, tuple[int, int]], labels: dict[str, dict[str, int | None]]
) -> tuple[list[Member], list[tuple[str, str]]]:
    """The images with their labels, and (name, kind) of what is not as one would expect.

    Where a label has no image of its key, that may be webdataset's, all up to the first dot: x.cls is the label of
    x.input.png if no other image begins so.
    """
    keys, short = {sample_key(name) for name in images}, Counter(map(short_sample_key, images))
    found: list[Member] = []
    used = set()
    for name, span in images.items():
        key, other = sample_key(name), short_sample_key(name)
        if key not in labels and other not in keys and short[other] == 1:
            key = other
        used.add(key)
        said = {label for label in labels.get(key, {}).values() if label is not None}
        why: str | None
        if len(said) > 1:
            why = f"no single label: {' and '.join(f'{v} in {n}' for n, v in labels[key].items() if v is not None)}"
        else:
            why = f"no label: {next(iter(labels[key]))} holds no class number" if key in labels and not said else None
        found.append((name, *span, said.pop() if len(said) == 1 else None, why))
    lost = [
        name for key, files in labels.items() if key not in used for name, label in files.items() if label is not None
    ]
    return found, [(name, "labels without an image") for name in lost]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    previous = -1
    for member in tar:
        if member.offset <= previous:
            raise ValueError("a header that points backwards")  # would be read for ever
        previous = member.offset
        yield member
        tar.members = []  # type: ignore[attr-defined]  # or they would all be kept


def _refusal(member: tarfile.TarInfo, shard_size: int) -> str | None:
    """Why a member is not used; None for an image, a label, a folder."""
    if (why := refusal(member.name)) or member.isdir():
        return why
    if not member.isreg() or member.issparse():
        return "not a regular file"
    if member.size < 0 or member.offset_data + member.size > shard_size:
        return "cut off by the end of the shard"
    return None


def _label(content: bytes) -> int | None:
    """The class number in a .cls file or in a JSON object's "label" or "cls"; None if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return value if isinstance(value, int) and 0 <= value < MAX_CLASSES and not isinstance(value, bool) else None


def _read_index(index: Path | None) -> dict[str, dict]:
    try:
        content = json.loads(index.read_text(encoding="utf-8")) if index is not None else {}
    except (OSError, ValueError):
        return {}
    usable = isinstance(content, dict) and content.get("version") == INDEX_VERSION
    return content["shards"] if usable else {}


def _write_index(index: Path | None, shards: dict[str, dict]) -> None:
    if index is None:
        return
    index.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(index, json.dumps({"version": INDEX_VERSION, "shards": shards}, separators=(",", ":")))
