"""Images -> a file of their codes: ``beitv2-fast encode IMAGES --tokenizer RUN_OR_FILE --out codes.npz``.

Finished pieces are kept in a hidden folder next to the output until all are there. A process that is killed at any
point loses the piece it was at; the same command goes on after the last one and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config.options import SOURCE, option
from ..distributed import PRECISIONS, autocast_dtype
from ..errors import UserError, first_lines, require
from ..models.tokenizer import Tokenizer
from ..runs.files import check_no_folder
from ..runs.folder import lock
from ..weights.create import create_model
from .pieces import open_pieces, read_piece, write_codes, write_piece

if TYPE_CHECKING:
    from ..data.images import ImageList

_log = logging.getLogger(__name__)

PIECE_BATCHES = 16  # batches between two states on disk


@dataclass(frozen=True)
class EncodeConfig:
    """Turn a folder or tar shards of images into a file of codes.

    Run again after an interruption, it goes on where it was.
    """

    tokenizer: Path = option(Path("runs/tokenizer"), f"the tokenizer, in any format: {SOURCE}")
    out: Path = option(Path("codes.npz"), "file to write: .npz or .safetensors")
    crop_pct: float = option(
        1.0, "side of the central square that is encoded, as a share of the shorter side", above=0, at_most=1
    )
    batch_size: int = option(64, "images per forward pass", at_least=1)
    precision: str = option(
        "auto", "arithmetic of the encoder; auto: bf16 on GPUs that have it and CPUs that multiply it fast, fp16 on "
        "older GPUs, else fp32", choices=("auto", *PRECISIONS),
    )  # fmt: skip
    device: str = option(
        "auto", "what computes; auto: all GPUs if there are any, else the CPU", choices=("auto", "cpu", "cuda")
    )
    workers: int | None = option(
        None, "processes that decode images; 0: only this one; none given: one per core with a GPU (16 at most), else "
        "half", at_least=0,
    )  # fmt: skip
    force: bool = option(False, "replace the output, and pieces that were made with other options or images")


def encode_folder(images: Path, config: EncodeConfig) -> tuple[int, list[tuple[str, str]]]:
    """Encode every image below a folder, or in tar shards, and write ``config.out``.

    The file holds ``codes`` [images, h, w] (uint16 up to 65,536 codes, else int32), ``paths`` (relative to the folder,
    with forward slashes, sorted; of shards SHARD.tar/MEMBER, in their order) and ``left_out`` (the paths of files that
    could not be read). In a .npz the last two are arrays of strings; in a .safetensors they are uint8, UTF-8 with a
    zero byte between names.

    Returns:
        how many images were encoded; (path, reason) of each that was left out.

    Raises:
        UserError: no images, no tokenizer, an output that exists, or pieces of an encoding with other options.
    """
    from ..data.find import find_images

    _check_out(config)
    found = find_images(images)
    _log.info(found.summary)
    model = create_model(checkpoint=config.tokenizer)
    if not isinstance(model, Tokenizer):
        raise UserError(
            f"--tokenizer {config.tokenizer} holds a {type(model).__name__.lower()}; a tokenizer is needed."
        )
    pieces = config.out.with_name(f".{config.out.name}.pieces")
    state = _state(found, model, config)
    pieces.mkdir(parents=True, exist_ok=True)
    held = lock(pieces)
    open_pieces(pieces, state, config.force)
    _encode_pieces(found, model, config, pieces)
    parts = [read_piece(pieces / f"{first:09d}.npz") for first in range(0, len(found.paths), _piece(config))]
    left_out = found.rejected + [(path, reason) for part in parts for path, reason in part[1].items()]
    if len(left_out) == len(found.paths) + len(found.rejected):
        raise UserError(f"none of the {len(left_out)} files in {images} can be read:\n{_reasons(left_out)}")
    write_codes(config.out, found.paths, parts, left_out)
    held.close()
    shutil.rmtree(pieces)
    if left_out:
        _log.warning("left out: %d\n%s", len(left_out), _reasons(left_out))
    return sum(len(part[0]) for part in parts), left_out


class _Images(Dataset):
    """indices -> those whose images can be read, the tokenizer's views of these [B, 3, H, W], the others' reasons."""

    def __init__(self, images: ImageList, size: int, crop_pct: float):
        from ..data.views import EvalView

        self.images, self.view = images, EvalView(size, crop_pct)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[list[int], Tensor | None, dict[int, str]]:
        from ..data.check import reason_to_reject

        good: list[int] = []
        views: list[Tensor] = []
        bad: dict[int, str] = {}
        for index in indices:
            try:
                views.append(self._view(index))
                good.append(index)
            except Exception as error:  # a decoder may raise anything at all on a damaged file
                bad[index] = reason_to_reject(self.images, index, error)
        return good, torch.stack(views) if views else None, bad

    def _view(self, index: int) -> Tensor:
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return self.view(self.images.open(index))["image"]


def _encode_pieces(images: ImageList, model: Tokenizer, config: EncodeConfig, pieces: Path) -> None:
    """Encode what has no piece on disk yet."""
    from ..data.torch_loader import TorchLoader

    tqdm = require("tqdm", "train", "A progress bar").tqdm
    paths, step = images.paths, _piece(config)
    todo = [first for first in range(0, len(paths), step) if not (pieces / f"{first:09d}.npz").exists()]
    batches = [
        list(range(at, min(at + config.batch_size, first + step, len(paths))))
        for first in todo
        for at in range(first, min(first + step, len(paths)), config.batch_size)
    ]
    devices = devices_of(config.device)
    models = [model.to(devices[0]), *(_copy(model, device) for device in devices[1:])]
    workers = _workers(config.workers, devices[0])
    dataset = _Images(images, model.config.encoder.image_size, config.crop_pct)
    loader = TorchLoader(dataset, batches, workers)
    dtype = autocast_dtype(config.precision, devices[0])
    done = len(paths) - sum(map(len, batches))
    with tqdm(total=len(paths), initial=done, unit="image", desc="encoding", disable=None) as bar:
        indices: list[int] = []
        codes: list[Tensor] = []
        left_out: dict[str, str] = {}
        good: list[int]
        views: Tensor | None
        bad: dict[int, str]
        for number, (good, views, bad) in enumerate(cast(Any, loader)):
            left_out |= {paths[index]: reason for index, reason in bad.items()}
            if views is not None:  # several GPUs take turns, none waits for another
                device = number % len(devices)
                codes.append(_codes(models[device], views.to(devices[device], non_blocking=True), dtype))
                indices += good
            bar.update(len(good) + len(bad))
            last = batches[number][-1] + 1
            if last % step == 0 or last == len(paths):
                file = pieces / f"{batches[number][0] // step * step:09d}.npz"
                write_piece(file, indices, [c.cpu() for c in codes], left_out, model.grid)
                indices, codes, left_out = [], [], {}


@torch.inference_mode()
def _codes(model: Tokenizer, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    device = images.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if device.type != "cuda":
            return model.encode(images)
        with torch.cuda.device(device):
            return model.encode(images)


def _copy(model: Tokenizer, device: torch.device) -> Tokenizer:
    copy = Tokenizer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().to(device)


def devices_of(device: str) -> list[torch.device]:
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise UserError("--device cuda was asked for, but torch sees no GPU. Use --device cpu, or install a GPU torch.")
    return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]


def _workers(workers: int | None, device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0))
    if workers is not None:
        return workers
    return min(cores, 16) if device.type == "cuda" else cores // 2


def _piece(config: EncodeConfig) -> int:
    return config.batch_size * PIECE_BATCHES


def _state(images: ImageList, model: Tokenizer, config: EncodeConfig) -> dict[str, Any]:
    """What the codes depend on, as JSON: pieces of another state are not gone on with."""
    from ..data.check import file_states

    files = hashlib.sha256()
    for path, state in zip(images.paths, file_states(images), strict=True):
        files.update(repr((path, *(state or (None,)))).encode())
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "images": files.hexdigest(),
        "tokenizer": weights.hexdigest(),
        "batch_size": config.batch_size,
        "piece": _piece(config),
        "crop_pct": config.crop_pct,
        "precision": config.precision,
        "device": devices_of(config.device)[0].type,
    }


def _check_out(config: EncodeConfig) -> None:
    if config.out.suffix not in (".npz", ".safetensors"):
        raise UserError(f"--out {config.out} should end in .npz or .safetensors, so that it is clear what to write.")
    check_no_folder(config.out)
    if config.out.exists() and not config.force:
        raise UserError(f"{config.out} exists. Give another --out, or --force to replace it.")


def _reasons(files: list[tuple[str, str]]) -> str:
    return first_lines([f"{path}: {reason}" for path, reason in files])
