"""Renames the entries of a state dict by the tables of ``names``, joining and splitting what a format has in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from .names import FORMATS

Templates = tuple[str, ...]


def to_ours(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(entries under our names, entries whose names the format's table does not have)."""
    return _rename(state, [(_tuple(theirs), (ours,)) for ours, theirs in FORMATS[source].items()])


def from_ours(state: Mapping[str, Tensor], target: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(entries under the format's names, entries for which it has no place)."""
    return _rename(state, [((ours,), _tuple(theirs)) for ours, theirs in FORMATS[target].items()])


def _rename(
    state: Mapping[str, Tensor], pairs: Iterable[tuple[Templates, Templates]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    patterns = [
        (_pattern(template), piece, sources, targets)
        for sources, targets in pairs
        for piece, template in enumerate(sources)
    ]
    result: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    pieces: dict[str, list[Tensor | None]] = {}  # target name -> what has been found of it
    names: dict[str, list[str]] = {}
    for name, value in state.items():
        found = next(((m, *row[1:]) for row in patterns if (m := row[0].fullmatch(name))), None)
        if found is None:
            rest[name] = value
            continue
        match, piece, sources, targets = found
        filled = [_fill(template, match) for template in targets]
        if len(sources) > 1:
            pieces.setdefault(filled[0], [None] * len(sources))[piece] = value
            names[filled[0]] = [_fill(template, match) for template in sources]
            result.setdefault(filled[0], value)  # keeps the place in the order
        elif len(targets) > 1:
            result.update(zip(filled, _split(name, value, len(targets)), strict=True))
        else:
            result[filled[0]] = value
    for target, parts in pieces.items():
        result[target] = _join(names[target], parts)
    return result, rest


def _join(names: list[str], parts: list[Tensor | None]) -> Tensor:
    missing = [name for name, part in zip(names, parts, strict=True) if part is None]
    if missing:
        raise CheckpointError(f"these weights are incomplete: {', '.join(missing)} is missing. Use an intact file.")
    return torch.cat([part for part in parts if part is not None])


def _split(name: str, value: Tensor, count: int) -> list[Tensor]:
    if value.shape[0] % count:
        raise CheckpointError(f"{name} is {list(value.shape)}: its rows cannot be divided into {count} equal parts.")
    return [part.clone() for part in value.chunk(count)]  # own memory each: safetensors refuses to share


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(escaped.replace(r"\*", "(?P<leaf>weight|bias)"))


def _fill(template: str, match: re.Match[str]) -> str:
    groups = match.groupdict()
    return template.replace("{i}", groups.get("i") or "").replace("*", groups.get("leaf") or "")


def _tuple(names: str | Templates) -> Templates:
    return (names,) if isinstance(names, str) else names
