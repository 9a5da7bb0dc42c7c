"""What the names of files, folders and members of shards mean, and how what is passed over for its name is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

SPLIT_ENDS = re.compile(r"[-_ ]?(set|data|dataset|images|imgs|img|split)?[-_ ]?\d*")  # of training_set and train2017
_TOLD = 6  # kinds of what is passed over
IMAGE_SUFFIXES = tuple(
    ".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .pbm .pcx .pgm .png .pnm .ppm .qoi "
    ".tga .tif .tiff .webp".split()
)
SPLITS = {  # whatever their case, and what SPLIT_ENDS may follow
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
# Beginnings of the names of folders that systems and programs leave in data sets, thumbnails in some of them.
SYSTEM_FOLDERS: tuple[str, ...]
SYSTEM_FOLDERS = ("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found", "paxheaders")
SYSTEM_FOLDERS += ("system volume information", "__pycache__")

SHARD_SUFFIXES = (".tar", ".arrow", ".parquet")
LIST_SUFFIXES = (".txt", ".tsv", ".json", ".jsonl")
MAX_CLASSES = 1 << 20  # a hostile label would else make a list of as many names

PassedOver = dict[str, tuple[int, str]]  # by kind, such as "files ending in .txt": how many, and the first one's name


def split_of(name: str) -> str | None:
    """The split that a folder's name means, whatever its case: "train", "val", "test"; None if it is another name."""
    for split, names in SPLITS.items():
        for spelling in names:
            if name.lower().startswith(spelling) and SPLIT_ENDS.fullmatch(name.lower(), len(spelling)):
                return split
    return None


def split_of_shard(name: str) -> str | None:
    """The split that a word of a shard's name means (imagenet-train-0001.tar); None if none does, or several do."""
    if not is_shard(name):
        return None
    found = {split_of(word) for word in re.findall("[a-z]+", name.lower())} - {None}
    return found.pop() if len(found) == 1 else None


def is_left_over(name: str) -> bool:
    """Whether a file or folder is hidden, or something that a system leaves beside the images."""
    return name.startswith(".") or name.lower().startswith(SYSTEM_FOLDERS)


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_shard(name: str) -> bool:
    """Whether it is a file of many images. In cache-*.arrow ``datasets`` keeps what it computed from the data."""
    return name.endswith(SHARD_SUFFIXES) and not is_left_over(name) and not name.startswith("cache-")


def refusal(path: str) -> str | None:
    """Why a path that a file names is not followed, whatever is there; None if it stays below where it starts."""
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "an absolute path"
    if "\\" in path or any(ord(c) < 32 for c in path):
        return "a path with a backslash or a control character"
    return "a path that leads out" if ".." in PurePosixPath(path).parts else None


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
    listed = [f"{kind} ({count:,}: {first}{', ...' if count > 1 else ''})" for kind, (count, first) in kinds[:_TOLD]]
    more = [f"{len(kinds) - _TOLD} more kinds"] if len(kinds) > _TOLD else []
    return "; passed over: " + ", ".join(listed + more) if kinds else ""


def sample_key(name: str) -> str:
    """What files of one sample share: the whole path without its last suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def short_sample_key(name: str) -> str:
    """webdataset's key: all up to the first dot of the file's name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def shared_keys(paths: list[str]) -> str:
    """For the log: that images have one key, or one that adds to another's, as an image's masks may; else nothing."""
    keys = Counter(map(sample_key, paths))
    same = [path for path in paths if keys[sample_key(path)] > 1]
    more = [path for path in paths if short_sample_key(path) != sample_key(path) and short_sample_key(path) in keys]
    texts = [(same, "share their key with another one"), (more, "have another one's key with something added")]
    return "".join(f"; {len(found):,} of them {what} ({found[0]}): all are read" for found, what in texts if found)
