"""What a person can mend: raised with one paragraph that says what was found, what was expected and what to do."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A wrong option, file or folder. Commands print its text alone and exit with code 2."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or made by another model or config."""


def first_lines(lines: Sequence[str], most: int = 10) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])


def first_few(names: Sequence[object], most: int = 8, between: str = ", ") -> str:
    """The first names, and dots if there are more."""
    return between.join(map(str, [*names[:most], *(["..."] if len(names) > most else [])]))


def require_floating(images: Tensor) -> None:
    """TypeError if images are integers, of which the arithmetic on them would make wrong numbers.

    Their range is not looked at: on a GPU that would wait for them.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"the images are {str(images.dtype).removeprefix('torch.')}, but floating-point numbers are needed. Of "
            "pixels from 0 to 255 make images.float() / 255, in [0, 1]."
        )


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'beitv2-fast[{extra}]'"
        ) from error
