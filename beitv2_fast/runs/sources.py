"""Where a model lies: wherever the commands and ``create_model`` read one, the same names are understood.

    runs/tokenizer, weights.pth                   what is on the disk: a run folder, a file, a folder of a hub's layout
    beitv2_base_patch16_224_pt1k                  one of ``PUBLISHED``, the weights of the BEiT v2 authors
    https://host/weights.pth                      any URL of a file
    hf-hub:ORGANIZATION/NAME[@REVISION]           a repository of the Hugging Face hub

Files go into torch.hub's own cache, repositories into huggingface_hub's. What is cached needs no network.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch.hub

from ..errors import CheckpointError, require

RELEASE = "https://github.com/addf400/files/releases/download/BEiT-v2"
HUB = "hf-hub:"
SAFE_FILES, OTHER_FILES = ("*.json", "*.safetensors"), ("*.bin", "*.pth", "*.pt")  # of a repository: the first suffice


@dataclass(frozen=True)
class Published:
    """Weights that the authors released.

    file: in RELEASE; hexadecimal digits at the end of its name are the start of its sha256. model: their shape, a name
    of ``create_model``. millions: of parameters. teacher: that a tokenizer learned from. tokenizer: whose codes a
    student predicts. classes: the logits of a classifier.
    """

    file: str
    model: str
    millions: int
    what: str
    teacher: str = ""
    tokenizer: str = ""
    classes: int = 0

    @property
    def url(self) -> str:
        return f"{RELEASE}/{self.file}"

    @property
    def digest(self) -> str | None:
        found = re.search(r"-([0-9a-f]{8})\.pth$", self.file)
        return found[1] if found else None


def _tokenizers() -> dict[str, Published]:
    rows = [
        ("3x768x12_clip", "d5036aa7", "vqkd_base_clip", 109, "a decoder of 3 blocks", "clip"),
        ("1x768x12_clip", "d93179da", "vqkd_base_clip_1", 95, "a decoder of 1 block", "clip"),
        ("1x768x12_dino", "663c55d7", "vqkd_base_dino", 95, "a decoder of 1 block", "dino"),
    ]
    names = {
        (name := f"vqkd_encoder_base_decoder_{kind}"): Published(
            f"{name}-{digest}.pth", model, millions, f"tokenizer learned from {teacher}, {blocks}", teacher
        )
        for kind, digest, model, millions, blocks, teacher in rows
    }
    return names


def _vits() -> dict[str, Published]:
    codes = "vqkd_encoder_base_decoder_3x768x12_clip"
    found = {}
    for size, student, classifier, larger in (("base", 106, 87, 103), ("large", 337, 304, 326)):
        name = f"beitv2_{size}_patch16_224_pt1k"
        rows = [
            ("", f"beitv2_{size}", student, "student after 1600 epochs of ImageNet-1k", codes, 0),
            ("_300e", f"beitv2_{size}", student, "student after 300 epochs of ImageNet-1k", codes, 0),
            ("_300e_ft1k", f"beitv2_{size}_classifier", classifier, "300 epochs, fine-tuned on ImageNet-1k", "", 1000),
            ("_ft1k", f"beitv2_{size}_classifier", classifier, "1600 epochs, fine-tuned on ImageNet-1k", "", 1000),
            ("_ft21k", f"beitv2_{size}_classifier", larger, "1600 epochs, fine-tuned on ImageNet-21k", "", 21841),
            ("_ft21kto1k", f"beitv2_{size}_classifier", classifier, "... then on ImageNet-1k", "", 1000),
        ]
        for kind, model, millions, what, tokenizer, classes in rows:
            found[name + kind] = Published(
                f"{name}{kind}.pth", model, millions, what, tokenizer=tokenizer, classes=classes
            )
    return found


PUBLISHED: dict[str, Published] = {**_tokenizers(), **_vits()}
SEGMENTERS = {  # what train/segment.py reads; create_model makes no such model
    f"beitv2_{size}_patch16_224_pt1k_{kind}": Published(
        f"beitv2_{size}_patch16_224_pt1k_{kind}.pth", "", millions, f"{what}, UPerNet on ADE20K", classes=150
    )
    for size, millions in (("base", 163), ("large", 440))
    for kind, what in (("ftade20k", "1600 epochs"), ("ft21ktoade20k", "... fine-tuned on ImageNet-21k"))
}
NAMED = PUBLISHED | SEGMENTERS


def is_remote(source: str | Path) -> bool:
    """Whether it is a name, a URL or a repository, which may have to be fetched."""
    return not Path(source).exists() and (str(source) in NAMED or _url(source) is not None or _is_hub(source))


def locate(source: str | Path, *, fetch: bool = True) -> Path:
    """The file or folder that a source means (see the top of this file), fetched if it is not in its cache.

    Processes that ask for the same file at the same time fetch it once: the others wait. A path is returned as it is,
    whatever is there.

    Args:
        fetch: False: what is not in a cache is returned as it is, too.

    Raises:
        CheckpointError: it cannot be fetched, or is not what its hash says; it tells which file to put where.
    """
    path = Path(source)
    if path.exists():
        return path
    url = _url(source)
    if known := NAMED.get(str(source)) or next((p for p in NAMED.values() if p.url == url), None):
        return _file(known.url, known.file, fetch, known.digest) or path
    if url:
        return _file(url, _cached_name(url), fetch) or path
    return (_repository(str(source), fetch) or path) if _is_hub(source) else path


def _is_hub(source: str | Path) -> bool:
    return str(source).startswith(HUB)


def _url(source: str | Path) -> str | None:
    """The URL; a Path has kept one of its two slashes."""
    found = re.fullmatch(r"(https?):/{1,2}([^/].*)", str(source))
    return f"{found[1]}://{found[2]}" if found else None


def _cached_name(url: str) -> str:
    """A plain file name, another one for each URL: their last parts alone are too often the same."""
    last = urlsplit(url).path.rsplit("/", 1)[-1]
    if not re.fullmatch(r"\w[\w.+-]*", last):
        raise CheckpointError(
            f"{url} does not end in the plain name of a file, such as weights.safetensors. Download the file yourself "
            "and name it."
        )
    return f"{hashlib.sha256(url.encode()).hexdigest()[:12]}_{last}"


def _file(url: str, name: str, fetch: bool, digest: str | None = None) -> Path | None:
    """A file in torch.hub's folder of checkpoints; None if it is not there and not to be fetched."""
    from filelock import FileLock  # torch needs it, too

    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file() or not fetch:
        return file if file.is_file() else None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():  # another process may have fetched it meanwhile
                _download(url, file, digest)
    except OSError as error:  # urllib's are, too
        raise CheckpointError(f"{url} could not be fetched ({_reason(error)}): put that file at {file}.") from error
    return file


def _download(url: str, file: Path, digest: str | None) -> None:
    """Goes on with what a connection that ended too soon has left, if the server's version (ETag) is still that."""
    part, tag = file.with_name(f".{file.name}"), file.with_name(f".{file.name}.etag")
    version = tag.read_text() if tag.exists() and part.exists() else ""
    headers = {"User-Agent": "torch.hub"}
    if version:
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": version}
    try:
        answer = urlopen(Request(url, headers=headers))
    except HTTPError as error:
        if error.code != 416 or not version:
            raise
        tag.unlink()  # nothing is missing of what is there: is it whole?
        return _download(url, file, digest)
    progress: Any = vars(torch.hub)["tqdm"]  # or torch's own, where tqdm is not installed
    with answer:
        begun = part.stat().st_size if answer.status == 206 else 0
        size = int(answer.headers["Content-Length"]) + begun if "Content-Length" in answer.headers else None
        tag.write_text(answer.headers.get("ETag") or "")
        with (
            part.open("ab" if begun else "wb") as out,
            progress(total=size, initial=begun, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while data := answer.read(2**20):
                out.write(data)
                bar.update(len(data))
    found = part.stat().st_size
    if size is not None and found != size:
        raise OSError(f"the connection ended after {found:,} of {size:,} bytes; the same command goes on from there")
    tag.unlink()
    if digest and not (of_file := hashlib.sha256(part.read_bytes()).hexdigest()).startswith(digest):
        part.unlink()
        raise OSError(f'invalid hash value (expected "{digest}", got "{of_file}")')
    part.replace(file)  # the name says whole


def _repository(source: str, fetch: bool) -> Path | None:
    """The snapshot of a repository in huggingface_hub's cache, or the only weights file of one without a config."""
    name, _, revision = source.removeprefix(HUB).partition("@")
    hub = require("huggingface_hub", "teachers", f"Reading {source}")
    try:
        for patterns in (SAFE_FILES, OTHER_FILES):
            folder = Path(
                hub.snapshot_download(
                    name, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=["*/*"],
                    local_files_only=not fetch,
                )
            )  # fmt: skip
            weights = [file for suffix in patterns if suffix != "*.json" for file in sorted(folder.glob(suffix))]
            if weights:
                break
    except Exception as error:  # the package has its own and its HTTP library's
        if not fetch:
            return None
        raise CheckpointError(
            f"{source} could not be fetched ({_reason(error)}): put the files of https://huggingface.co/{name} into a "
            "folder and name that folder."
        ) from error
    return weights[0] if len(weights) == 1 and not (folder / "config.json").is_file() else folder


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return (str(getattr(error, "reason", "") or error).strip().split("\n")[0] or type(error).__name__)[:200].rstrip(".")
