"""Configs are typed dataclasses; the command line, the limits, the JSON of a run folder are derived from them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .. import __version__
from ..distributed import own_cores
from ..errors import UserError

C = TypeVar("C", bound="Options")


OUT = "run folder for config, log, metrics and checkpoints; the same command run again resumes it"
SOURCE = "a run folder, a file, a URL, hf-hub:ORGANIZATION/NAME, or a name that `beitv2-fast models` lists"
VERSION = f"beitv2-fast {__version__}"
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def option(
    default: Any,
    help: str,
    *,
    free: bool = False,
    holds: str = "",
    choices: Sequence[str] | None = None,
    group: str = "",
    **limits: float,
) -> Any:
    """A config value with its help text.

    ``free``: it does not change the result and may differ when a run resumes. ``holds``: it is a path, and not the path
    but what is there has to stay: "images"; "weights" that every step needs; "start": weights that are read once.
    ``group``: the heading in --help of this one and the next ones. ``limits``: some of ``LIMITS``.
    """
    metadata = {"help": help, "free": free, "holds": holds, "choices": choices, "group": group, "limits": limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """A command's. ``stage``: which command, as its config.json says. ``example``: of a command line, for --help."""

    stage: ClassVar[str] = ""
    example: ClassVar[str] = ""

    def implied(self: C, preset: C) -> dict[str, Any]:
        """What options that differ from the preset's imply for others, unless these are given."""
        return {}


@dataclass(frozen=True)
class RunConfig(Options):
    """What every command with a run folder has."""

    out: Path = option(Path("runs/run"), OUT)
    seed: int = option(0, "everything random follows from it: the same seed gives the same run", at_least=0)
    device: str = option(
        "auto", "what computes; auto: a CUDA or ROCm GPU if there is one, else the CPU", free=True,
        choices=("auto", "cpu", "cuda"),
    )  # fmt: skip
    workers: int = option(
        own_cores(), "processes of each rank that check and load images, by default as many as it has cores, those of "
        "the machine divided by the ranks on it; 0: the training process does it", free=True, at_least=0,
    )  # fmt: skip
    check: str = option(
        "decode", "what is done once with every image before it is used; decode: all that is damaged is found and left "
        "out; header: only sizes are read, which misses files that are cut short; none: nothing", free=True,
        choices=("decode", "header", "none"),
    )  # fmt: skip


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The values that determine a run's result, as JSON types."""
    return {
        f.name: _plain(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if not f.metadata["free"] and f.name != "out"
    }


def to_json(config: RunConfig) -> dict[str, Any]:
    """The stage and all values, as JSON types."""
    return {"stage": config.stage} | {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
    """The config that ``to_json`` wrote. Unknown names are an error: the run was made by another version."""
    values = {name: value for name, value in values.items() if name != "stage"}
    unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise UserError(
            f"a run's config has values that a {cls.__name__} does not know: {', '.join(sorted(unknown))}. "
            "Name the run folder of another stage, or one made by this version."
        )
    types_ = typing.get_type_hints(cls)
    return cls(**{name: _restore(types_[name], value) for name, value in values.items()})


def parse(cls: type[C], presets: Mapping[str, C], argv: Sequence[str] | None = None) -> tuple[C, int | None]:
    """Read the command line: a preset, then single options over it.

    Returns:
        (config, local_rank); local_rank is what the `deepspeed` launcher passes, None without it.
    """
    name = _preset(presets, argv)
    title = (cls.__doc__ or "").strip()
    parser = Parser(
        usage="%(prog)s [--preset NAME] [options]",
        description=f"{title} Values in brackets: those of the preset {name}.",
        epilog=f"example: {cls.example}" if cls.example else None,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    shown = "the values of options that are not given; before --help, the values it shows"
    parser.add_argument("--preset", choices=list(presets), default="base", help=f"{shown} [{name}]")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS, default=None)
    add_options(parser, presets[name])
    given = vars(parser.parse_args(argv))
    preset, local_rank = presets[given.pop("preset")], given.pop("local_rank")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    config = dataclasses.replace(preset, **given)
    check_limits(config)
    return dataclasses.replace(config, **{**config.implied(preset), **given}), local_rank


class Parser(argparse.ArgumentParser):
    """argparse's, which suggests an option in place of one that it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._near(unknown)}")
        return found, unknown

    def _near(self, unknown: Sequence[str]) -> str:
        flags = [word[2:].partition("=")[0].lower() for word in unknown if word.startswith("--")]
        actions = self._option_string_actions.items()
        known = [name[2:] for name, action in actions if name.startswith("--") and action.help != argparse.SUPPRESS]
        near = [f"--{name}" for flag in flags for name in difflib.get_close_matches(flag, known, 1)]
        return f" (did you mean {', '.join(dict.fromkeys(near))}?)" if near else ""


def add_options(parser: argparse.ArgumentParser, shown: Any) -> None:
    """An option for every field of a dataclass of ``option``s; --help shows the values of this one."""
    types_ = typing.get_type_hints(type(shown))
    group: argparse._ActionsContainer = parser
    for f in dataclasses.fields(shown):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind, flag = types_[f.name], "--" + f.name.replace("_", "-")
        text = f"{f.metadata['help']} [{_show(getattr(shown, f.name))}]"
        common: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is tuple:
            item, count = typing.get_args(kind)[0], len(typing.get_args(kind))
            nargs = "+" if typing.get_args(kind)[-1] is Ellipsis else count
            group.add_argument(flag, type=_typed(item), nargs=nargs, metavar=item.__name__.upper(), **common)
        else:
            item = _optional(kind)
            group.add_argument(
                flag, type=_typed(item), choices=f.metadata["choices"], metavar=_metavar(f, item), **common
            )


def path(text: str) -> Path:
    """A path as it is typed: shells leave the ``~`` of ``--out=~/x``, and one within quotes, as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error} Write ./{text} for a name that begins so.") from error


def check_limits(config: Any) -> None:
    """UserError if a number is not finite or outside the limits of its option, or a range runs backwards."""
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)]
        limits = f.metadata["limits"]
        inside = all(LIMITS[name](v, limit) for v in numbers for name, limit in limits.items())
        if not (inside and all(map(math.isfinite, numbers))):
            wanted = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
            raise UserError(f"{flag} is {_show(value)}, but must be {wanted or 'a finite number'}.")
        if f.name in ("crop_scale", "scale_range") and value[0] > value[1]:
            raise UserError(f"{flag} is {_show(value)}, but its first number must not be above its second.")


def _preset(presets: Mapping[str, C], argv: Sequence[str] | None) -> str:
    """The preset on the command line, whose values --help shows."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="base")
    name = first.parse_known_args(argv)[0].preset
    return name if name in presets else "base"


def _metavar(f: dataclasses.Field, item: type) -> str:
    return "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else item.__name__.upper()


def _typed(item: type) -> Callable[[str], Any]:
    return path if item is Path else item


def _optional(kind: Any) -> type:
    """X of Optional[X]; X itself otherwise."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _restore(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(map(typing.get_args(kind)[0], value))
    return _optional(kind)(value)
