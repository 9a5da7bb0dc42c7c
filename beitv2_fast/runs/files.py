"""Files that are whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError


def flush(path: Path) -> None:
    """fsync a file or folder, so that the rename that follows cannot reach the disk before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_no_folder(path: Path) -> None:
    """UserError if a folder is where a file is to be written, which would take its place."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is to be written. Name another one; no folder is replaced.")


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file or folder beside ``path``, flush it to disk, then give it its name.

    A crash leaves the old one or the new one, and a failure nothing else. Several writers do not meet.

    Raises:
        UserError: the name is a folder's, and a file is written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        if not temporary.is_dir():
            check_no_folder(path)
        for file in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            flush(file)
        old = path.with_name(f"{temporary.name}.old")
        if path.is_dir():  # a rename replaces only files
            path.rename(old)
        temporary.replace(path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """``atomically`` for a file of text."""
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
