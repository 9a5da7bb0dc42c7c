"""The command ``beitv2-fast`` (also ``python -m beitv2_fast``): weights, codes, pictures of runs, names of models."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.options import SOURCE, VERSION, Parser, add_options, check_limits, path
from ..config.show import ExploreConfig
from ..distributed import run_main
from ..errors import require
from ..runs.checkpoints import compact
from ..runs.sources import NAMED, PUBLISHED
from ..show.explore import explore
from ..weights.create import ALIASES, MODELS
from ..weights.names import FORMATS
from .convert import convert_file
from .encode import EncodeConfig, encode_folder
from .picture_options import PICTURES


def parser() -> Parser:
    """The command's options."""
    result = Parser(prog="beitv2-fast", description="BEiT v2: weights in and out, images to codes, looks at runs.")
    result.add_argument("--version", action="version", version=VERSION)
    commands = result.add_subparsers(dest="command", required=True)
    help = "weights between the published checkpoints, this package, timm and transformers"
    convert = commands.add_parser("convert", help=help, description=f"Convert {help}.")
    convert.add_argument("input", metavar="IN", type=path, help=SOURCE)
    convert.add_argument(
        "output", metavar="OUT", type=path,
        help="NAME.safetensors, NAME.pth, or a folder: for transformers and beitv2_fast, for its from_pretrained",
    )  # fmt: skip
    convert.add_argument("--to", choices=list(FORMATS), required=True, help="the format to make")
    convert.add_argument("--from", dest="source", choices=list(FORMATS), help="the format of IN [recognized]")
    convert.add_argument("--model", help="name of the model, for what weights do not tell, such as heads [none]")
    convert.add_argument("--force", action="store_true", help="replace OUT")
    encode = commands.add_parser(
        "encode", help="a folder or tar shards of images to a file of codes", description=EncodeConfig.__doc__
    )
    encode.add_argument(
        "images", metavar="IMAGES", type=path, help="folder of images, with or without folders in it, or tar shards"
    )
    add_options(encode, EncodeConfig())
    explore = commands.add_parser(
        "explore", help="a local page to look at a run with", description=ExploreConfig.__doc__
    )
    explore.add_argument("run", metavar="RUN", type=path, help=f"folder of the runs, or {SOURCE}")
    add_options(explore, ExploreConfig())
    pictures = commands.add_parser(
        "picture", help="pictures of a run as PNG files", description="Pictures of a run as PNG files."
    ).add_subparsers(dest="kind", required=True)
    for kind, config in PICTURES.items():
        text = " ".join((type(config).__doc__ or "").split())
        picture = pictures.add_parser(kind, help=text.split(":")[0].split(".")[0], description=text)
        picture.add_argument("run", metavar="RUN", type=path, nargs="+", help=f"folder of the runs, or {SOURCE}")
        picture.add_argument("-o", "--out", type=path, required=True, help="the .png file to write")
        add_options(picture, config)
    commands.add_parser("models", help="published weights and models by name", description="List the models' names.")
    return result


def run_command(argv: Sequence[str] | None = None) -> int:
    """One command; mistakes are UserErrors."""
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if command == "convert":
        _convert(**given)
    elif command == "picture":
        require("matplotlib", "demo", "A picture")
        from .picture import write_picture

        kind, runs, out = given.pop("kind"), given.pop("run"), given.pop("out")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        print(write_picture(kind, runs, out, given_options(PICTURES[kind], given)))
    elif command == "explore":
        folder = given.pop("run")
        return explore(folder, given_options(ExploreConfig(), given))
    elif command == "encode":
        images = given.pop("images")
        config = given_options(EncodeConfig(), given)
        count, left_out = encode_folder(images, config)
        print(f"{config.out}: the codes of {count:,} images; {len(left_out):,} left out")
    else:
        _list_models()
    return 0


def _list_models() -> None:
    print("published weights, by name wherever a model is read\n")
    for name, published in NAMED.items():
        print(f"  {name:<43}{published.millions:>4} M parameters  {published.what}")
    print("\nmodels with random weights, for create_model; other names of theirs\n")
    aliases = {alias: name for alias, name in ALIASES.items() if alias not in PUBLISHED}
    for model in MODELS:
        names = ", ".join(alias for alias, name in aliases.items() if name == model)
        print(f"  {model:<26}{names}".rstrip())


def given_options(config: Any, given: dict[str, Any]) -> Any:
    """A config with the options of the command line, within their limits."""
    config = dataclasses.replace(config, **given)
    check_limits(config)
    return config


def _convert(input: Path, output: Path, to: str, source: str | None, model: str | None, force: bool) -> None:
    read_as, state = convert_file(input, output, to, source=source, model=model, force=force)
    print(f"{input} ({read_as}) -> {output} ({to}): {len(state)} tensors")
    if state.extras:
        names = ", ".join(compact(list(state.extras)))
        print(f"{to} has no place for {len(state.extras)} more, which are kept next to it for the way back: {names}")


def main() -> None:
    """The entry point: a mistake is one paragraph and exit code 2."""
    run_main(run_command)


if __name__ == "__main__":
    main()
