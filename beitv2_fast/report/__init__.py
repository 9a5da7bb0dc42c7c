"""The report of the main job: one self-contained HTML file, and its pictures as PNG files beside it.

Curves of both trainings, what the codes mean, what the student guesses, and what the probe found. Whatever is not there
yet, or was interrupted, is said in its place.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..attention_maps import attention_probabilities, query_attention
from ..config import ReportConfig
from ..data import ImageFolder
from ..errors import UserError, require
from ..images import ImageList
from ..run import write_atomically
from ..transforms import EvalView
from .attention_sheets import attention_columns, attention_sheet
from .data import choose_codes, pretrain_view, sample_images
from .downstream import pictures_of
from .findings import Findings, gather
from .overlay_sheets import overlay_sheet
from .page import Picture, page
from .plots import codebook_panels, draw_panels, pretrain_panels, tokenizer_panels
from .sheets import code_sheet, display_size, mask_sheet, token_map_sheet
from .text import TITLE, introduction, sections, tiles
from .theme import DARK, LIGHT, Theme

__all__ = ["PAGE", "build_report"]

PAGE = "report.html"
MASK_EXAMPLES = 4
PATCHES_A_CODE = 12


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
    drawings = _drawings(found, config, rows)
    pictures = []
    for name, (alt, photo, draw) in tqdm(drawings.items(), desc="report: pictures", unit="picture", dynamic_ncols=True):
        pictures.append(Picture(name, draw(LIGHT), draw(DARK), alt, photo))
    body = sections(found, {p.name: p for p in pictures}, config.data, {"all": len(rows), "top": top})
    _write(config.out, page(TITLE, introduction(found), tiles(found), body), pictures)
    return config.out / PAGE


Drawing = tuple[str, bool, Callable[[Theme], Image.Image]]  # alternative text, is it of photographs, how to draw it


def _drawings(found: Findings, config: ReportConfig, rows: list[int]) -> dict[str, Drawing]:
    """The report's pictures by name: those for which there is something to draw."""
    drawings: dict[str, Drawing] = {}
    curves = (
        ("tokenizer", "Curves of the tokenizer's training", tokenizer_panels(found.tokenizer.metrics)),
        ("codebook", "Use of the codebook", codebook_panels(found.tokenizer.metrics, found.usage)),
        ("pretraining", "Curves of the pre-training", pretrain_panels(found.pretrain.metrics, found.hidden_usage)),
    )
    for name, alt, panels in (*curves, *((n, *picture) for n, picture in pictures_of(found.downstream).items())):
        if any(p.curves or p.bars for p in panels):
            drawings[name] = alt, False, lambda theme, panels=panels: draw_panels(panels, theme, config.scale)
    for i, run in enumerate(config.downstream):
        if (sheet := overlay_sheet(run)) is not None:
            alt = "Photographs, their classes, and the classes predicted"
            drawings[f"overlays_{i}"] = alt, True, lambda theme, sheet=sheet: sheet
    if found.codes is None:
        return drawings
    grid = found.tokenizer.model.grid
    if config.examples:
        drawings["token_maps"] = "Photographs and their token maps", True, _maps(found, config, grid)
        if found.guesses is not None:
            drawings["masks"] = "Photographs, masks, and codes of hidden patches", True, _masks(found, config, grid)
            drawings["attention"] = (
                "A photograph, and what one of its patches attends to",
                True,
                _attention(found, config, grid),
            )
    if rows:
        drawings["codes"] = "Patches grouped by code", True, lambda theme: code_sheet(
            found.images, found.codes, grid, found.usage, rows, found.colours, theme, config.scale,
            columns=PATCHES_A_CODE, seed=config.seed,
        )  # fmt: skip
    return drawings


def _maps(found: Findings, config: ReportConfig, grid: tuple[int, int]) -> Callable[[Theme], Image.Image]:
    chosen = sample_images(found.shown, config.examples, config.seed)
    photos = list(_photos(found.shown, chosen, display_size(grid, len(chosen), config.scale)))
    model, device = found.tokenizer.model, found.tokenizer.model.quantize.codebook.device
    views = torch.stack(list(_photos(found.shown, chosen, model.config.encoder.image_size)))
    codes = model.encode(views.to(device)).cpu().unflatten(1, grid)
    names = [_name(found.shown, i) for i in chosen]
    return lambda theme: token_map_sheet(photos, codes, found.colours, names, theme, config.scale)


def _masks(found: Findings, config: ReportConfig, grid: tuple[int, int]) -> Callable[[Theme], Image.Image]:
    # Another seed than the token maps': other photographs, where there are enough.
    chosen = sample_images(found.shown, min(config.examples, MASK_EXAMPLES), config.seed + 1)
    size = display_size(grid, 4, config.scale)
    crops = ImageFolder(found.shown, pretrain_view(found.pretrain.config, 1, size), config.seed)
    photos = [crops[0, i]["tokenizer"] for i in chosen]
    g = found.guesses
    masks, codes, guesses = (x[chosen].unflatten(1, grid) for x in (g.masks, g.codes, g.guesses))
    names = [_name(found.shown, i) for i in chosen]
    return lambda theme: mask_sheet(photos, masks, codes, guesses, found.colours, names, theme, config.scale)


def _attention(found: Findings, config: ReportConfig, grid: tuple[int, int]) -> Callable[[Theme], Image.Image]:
    model, device = found.pretrain.model, found.tokenizer.model.quantize.codebook.device
    # Another photograph than the other pictures', where there are enough.
    chosen = sample_images(found.shown, 1, config.seed + 2)
    views = torch.stack(list(_photos(found.shown, chosen, model.vit_config.image_size)))
    patch = grid[0] // 2 * grid[1] + grid[1] // 2
    heads = query_attention(attention_probabilities(model, views.to(device)), patch, grid)[0].cpu()
    photo = next(_photos(found.shown, chosen, display_size(grid, attention_columns(len(heads)), config.scale)))
    what = f"student, layer {len(model.blocks)}"
    return lambda theme: attention_sheet(photo, heads, patch, what, theme, config.scale)


def _photos(images: ImageList, indices: list[int], size: int) -> Iterator[Tensor]:
    """Centre squares [3, size, size] in [0, 1]."""
    view = EvalView(size, 1.0)
    return (view(images.open(i))["image"] for i in indices)


def _name(images: ImageList, index: int) -> str:
    """The class of an image, or its file's name."""
    return Path(images.paths[index]).name if images.labels is None else images.classes[images.labels[index]]


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / PAGE).is_file())):
        raise UserError(f"{out} exists and is no report's folder (it has no {PAGE}). Choose another --out.")


def _write(out: Path, html: str, pictures: list[Picture]) -> None:
    """The page first: a folder that has it is known to be a report's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PAGE, html)
        for picture in pictures:
            for name, image in ((picture.name, picture.light), (f"{picture.name}_dark", picture.dark)):
                part = out / f".{name}.{os.getpid()}"
                buffer = io.BytesIO()
                image.save(buffer, "png")
                part.write_bytes(buffer.getvalue())
                part.replace(out / f"{name}.png")
    except OSError as error:
        raise UserError(f"the report could not be written to {out}: {error}. Choose another --out.") from error
