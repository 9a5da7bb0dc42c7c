"""What a person can mend: raised with one paragraph that says what was found, what was expected and what to do."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType


class UserError(ValueError):
    """A wrong option, file or folder. Commands print only its text and exit with code 2."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or made by another model or config."""


class DataError(UserError):
    """The images given cannot be used; the message says which and what to do about it."""


def first_lines(lines: Sequence[str], most: int = 10) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])


def first_few(names: Sequence[object], most: int = 8, between: str = ", ") -> str:
    """The first names, and dots if there are more."""
    return between.join(map(str, [*names[:most], *(["..."] if len(names) > most else [])]))


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'beitv2-fast[{extra}]'"
        ) from error
