"""The report of the main job: one self-contained HTML file, and its pictures as PNG files next to it.

Curves of both trainings, what the codes mean, what the student guesses, and what the probe found. Whatever is not there
yet, or was interrupted, is said in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from ...config.show import ReportConfig
from ...errors import UserError, require
from ...runs.files import atomically, write_atomically
from ..codes import choose_codes
from ..theme import DARK, LIGHT
from .drawings import drawings_of
from .findings import gather
from .page import Figure, page
from .text import TITLE, introduction, sections, tiles

__all__ = ["PAGE", "build_report"]

PAGE = "report.html"


def build_report(config: ReportConfig, device: torch.device, say: Callable[[str], None] = print) -> Path:
    """Write ``config.out``/report.html and the PNG files; an earlier report there is replaced.

    Args:
        say: is told what is missing, a line each.

    Returns:
        the page's path.

    Raises:
        UserError: nothing to report on, runs that do not belong together, no images, or a ``config.out`` with other
            things in it.
    """
    require("matplotlib", "demo", "A report")
    _check_folder(config.out)
    found = gather(config, device)
    for problem in found.problems():
        say(f"report: {problem}")
    rows, top = choose_codes(found.usage, config.code_rows) if found.usage else ([], 0)
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    drawings = drawings_of(found, config, rows)
    pictures = []
    bar = tqdm(drawings.items(), desc="report: pictures", unit="picture", dynamic_ncols=True, disable=None)
    for name, (alt, photo, draw) in bar:
        pictures.append(Figure(name, draw(LIGHT), draw(DARK), alt, photo))
    body = sections(found, {p.name: p for p in pictures}, {"all": len(rows), "top": top})
    _write(config.out, page(TITLE, introduction(found), tiles(found), body), pictures)
    return config.out / PAGE


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / PAGE).is_file())):
        raise UserError(f"{out} exists and is no report's folder (it has no {PAGE}). Choose another --out.")


def _write(out: Path, html: str, pictures: list[Figure]) -> None:
    """The page first: a folder that has it is known to be a report's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PAGE, html)
        for picture in pictures:
            for name, image in ((picture.name, picture.light), (f"{picture.name}_dark", picture.dark)):
                atomically(out / f"{name}.png", functools.partial(image.save, format="png"))
    except OSError as error:
        raise UserError(f"the report could not be written to {out}: {error}. Choose another --out.") from error
