"""Tar shards in webdataset's layout: KEY.jpg beside KEY.cls or KEY.json, whose members are read in place.

An index says once where each image lies, so that shards are sampled, shuffled, divided among ranks and resumed as
folders are. Nothing is ever unpacked.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from .errors import require
from .images import SUFFIXES, DataError, ImageList

INDEX_VERSION = 1
SCANNERS = 8  # shards that are scanned at once: on network storage most of the time is waiting
MAX_LABEL_BYTES = 1 << 20
MAX_CLASSES = 1 << 20  # a hostile label would else make a list of as many names
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of a pattern such as train-{0000..0146}.tar

Member = tuple[str, int, int, int | None]  # name, first byte, bytes, label


def shards_of(root: Path, split: str | None) -> list[Path]:
    """The shards that --data names: a .tar file, a pattern, or a folder of .tar files; none if it names something else.

    Raises:
        DataError: a pattern that no file matches.
    """
    text = str(root)
    if root.is_dir():
        folder = root / split if split and (root / split).is_dir() else root
        return sorted(path for path in folder.glob("*.tar") if path.is_file())
    if root.is_file():
        return [root] if root.suffix == ".tar" else []
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


def find_shard_images(shards: list[Path], index: Path | None = None) -> ImageList:
    """The images of the shards, in the order of their names; labels, if every image has one.

    Members that a careless reader would write elsewhere or stumble over are left out and listed in `rejected`: absolute
    paths, paths with "..", backslashes or control characters, links, devices, sparse files, names that come twice, and
    what is cut off. Other members than images and labels are passed over.

    Args:
        index: a JSON file that keeps what was found, so that a restart scans only shards that have changed.

    Raises:
        DataError: no shard holds an image.
    """
    root = Path(os.path.commonpath([path.resolve().parent for path in shards]))
    names = [path.resolve().relative_to(root).as_posix() for path in shards]
    known = _read_index(index)
    states = {name: [(root / name).stat().st_size, (root / name).stat().st_mtime_ns] for name in names}
    todo = [name for name in names if known.get(str(root / name), {}).get("state") != states[name]]
    if todo:
        for name, (members, rejected) in zip(todo, _scan_all(root, todo), strict=True):
            known[str(root / name)] = {"state": states[name], "members": members, "rejected": rejected}
        _write_index(index, {str(root / name): known[str(root / name)] for name in names})
    return _image_list(root, {name: known[str(root / name)] for name in names})


def _image_list(root: Path, scanned: dict[str, dict]) -> ImageList:
    members = [(f"{shard}/{member[0]}", *member[1:]) for shard, found in scanned.items() for member in found["members"]]
    rejected = [
        (f"{shard}/{name}" if name else shard, why) for shard, f in scanned.items() for name, why in f["rejected"]
    ]
    if not members:
        reasons = "".join(f"\n  {name}: {why}" for name, why in rejected[:10])
        raise DataError(
            f"The {len(scanned)} shards in {root} hold no images. Expected members such as KEY.jpg and "
            f"KEY.cls.{reasons}"
        )
    labels = [label for *_, label in members]
    labelled = all(label is not None for label in labels)
    return ImageList(
        root,
        [name for name, *_ in members],
        labels if labelled else None,
        [str(i) for i in range(max(labels) + 1)] if labelled else [],
        rejected,
        spans=[(first, length) for _, first, length, _ in members],
    )


def _scan_all(root: Path, names: list[str]) -> Iterator[tuple[list[Member], list[tuple[str, str]]]]:
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    with ThreadPoolExecutor(SCANNERS) as pool, tqdm(total=len(names), desc="indexing", unit="shard") as bar:
        for result in pool.map(scan_shard, (root / name for name in names)):
            bar.update()
            yield result


def scan_shard(path: Path) -> tuple[list[Member], list[tuple[str, str]]]:
    """The images of one shard in its order, and (member, reason) of what was refused; "" for the shard itself."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    rejected: list[tuple[str, str]] = []
    seen: set[str] = set()
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar):
                why = _refusal(member, size) or ("a name that comes twice" if member.name in seen else None)
                seen.add(member.name)
                if why is not None:
                    rejected.append((member.name, why))
                elif PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                    images[member.name] = (member.offset_data, member.size)
                elif member.isreg() and member.name.endswith((".cls", ".json")):
                    label = _label(os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset_data))
                    if label is not None:
                        labels[_key(member.name)] = label
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        rejected.append(("", f"not an uncompressed tar file as a whole ({error})"))
    return [(name, *span, labels.get(_key(name))) for name, span in images.items()], rejected


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    previous = -1
    for member in tar:
        if member.offset <= previous:
            raise ValueError("a header that points backwards")  # would be read for ever
        previous = member.offset
        yield member
        tar.members = []  # or they would all be kept


def _refusal(member: tarfile.TarInfo, shard_size: int) -> str | None:
    """Why a member is not used; None for an image, a label, a folder."""
    name = member.name
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if "\\" in name or any(ord(c) < 32 for c in name):
        return "a path with a backslash or a control character"
    if ".." in PurePosixPath(name).parts:
        return "a path that leads out of the archive"
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "not a regular file"
    if member.size < 0 or member.offset_data + member.size > shard_size:
        return "cut off by the end of the shard"
    return None


def _key(name: str) -> str:
    """What files of one sample share: all up to the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.', 1)[0]}"


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
    part = index.with_name(f"{index.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"version": INDEX_VERSION, "shards": shards}, separators=(",", ":")), encoding="utf-8")
    os.replace(part, index)
