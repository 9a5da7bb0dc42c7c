"""What ``beitv2-fast encode`` has on disk: the pieces that are finished, and the file of codes that becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, require
from ..runs.files import atomically, write_atomically

STATE_FILE = "state.json"


def open_pieces(pieces: Path, state: dict[str, Any], force: bool) -> None:
    """Check that pieces in the folder belong to this encoding; without any, or forced, start again."""
    file = pieces / STATE_FILE
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        stored = None  # killed before it was written: there are no pieces either
    if stored == state:
        return
    if stored is not None and not force and any(pieces.glob("*.npz")):
        different = [name for name in state if not isinstance(stored, dict) or stored.get(name) != state[name]]
        raise UserError(
            f"{pieces} holds the beginning of an encoding with other {', '.join(different)}. Nothing was changed. Give "
            "the same options and images to go on with it, --force to start again, or another --out."
        )
    for piece in pieces.glob("*.npz"):
        piece.unlink()
    write_atomically(file, json.dumps(state, indent=2) + "\n")


def write_piece(file: Path, indices: list[int], codes: list[Tensor], left_out: dict, grid: tuple[int, int]) -> None:
    numpy = require("numpy", "train", "Writing codes")
    grids = torch.cat(codes).view(-1, *grid).to(torch.int32) if codes else torch.empty(0, *grid, dtype=torch.int32)
    text = numpy.frombuffer(json.dumps(left_out).encode(), dtype=numpy.uint8)
    _save(file, {"codes": grids.numpy(), "indices": numpy.array(indices, numpy.int64), "left_out": text})


def read_piece(file: Path) -> tuple[Any, dict[str, str], Any]:
    """(codes [n, h, w] int32, {path: reason}, indices [n])"""
    with require("numpy", "train", "Reading codes").load(file) as part:
        return part["codes"], json.loads(part["left_out"].tobytes()), part["indices"]


def write_codes(out: Path, paths: list[str], parts: list[tuple], left_out: list[tuple[str, str]]) -> None:
    numpy = require("numpy", "train", "Writing codes")
    codes = numpy.concatenate([part[0] for part in parts])
    codes = codes.astype(numpy.uint16 if codes.max() < 2**16 else numpy.int32)
    names = [paths[index] for part in parts for index in part[2]]
    missing = [path for path, _ in left_out]
    if out.suffix == ".npz":
        _save(out, {"codes": codes, "paths": _strings(names), "left_out": _strings(missing)})
        return
    texts = {"paths": "\0".join(names), "left_out": "\0".join(missing)}
    raw = {key: numpy.frombuffer(text.encode("utf-8", "surrogateescape"), numpy.uint8) for key, text in texts.items()}
    _save(out, {"codes": codes, **raw})


def _strings(values: list[str]) -> Any:
    numpy = require("numpy", "train", "Writing codes")
    return numpy.array(values, dtype=numpy.str_) if values else numpy.array([], dtype="U1")


def _save(path: Path, arrays: dict[str, Any]) -> None:
    """So that a crash leaves the old file or the new one."""

    def write(temporary: Path) -> None:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                require("numpy", "train", "Writing codes").savez(file, **arrays)
        else:
            require("safetensors.numpy", "train", "Writing codes").save_file(arrays, temporary)

    atomically(path, write)
