"""Sheets of photographs for the report: token maps, masks and predictions, patches by code. PIL images, labels in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.images import ImageList
from ..data.views import EvalView
from ..pictures import masked_picture, token_map
from .codes import CodeUsage, choose_patches
from .theme import WIDTH, Theme, lettering, shortened

DIMMED = 0.35
FONT, SMALL = 13, 11.5  # CSS pixels
LABEL = 118  # width of the row labels


@dataclass(frozen=True)
class Label:
    """Of a row: the first line stands out; a swatch [3] in [0, 1] goes before it, a bar [3, 1, W] from 0 to 1 below."""

    lines: list[str]
    swatch: Tensor | None = None
    bar: Tensor | None = None


class Sheet:
    """Pictures in rows and columns with labels, as wide as the page; sizes are CSS pixels, drawn times ``scale``."""

    def __init__(self, theme: Theme, scale: float):
        self.theme, self.scale = theme, scale

    def draw(
        self,
        rows: Sequence[Sequence[Image.Image | None]],
        labels: list[Label],
        columns: list[str],
        cell: int,
        gap: int = 8,
    ) -> Image.Image:
        """Rows of square pictures, each ``cell`` wide or less; columns: headings, or [] for none."""
        px = self._px
        head = 26 if columns else 0
        height = head + len(rows) * (cell + gap) - gap
        sheet = Image.new("RGB", (px(WIDTH), px(height)), self.theme.paper)
        draw = ImageDraw.Draw(sheet)
        for j, text in enumerate(columns):
            self._text(draw, LABEL + j * (cell + gap), 2, text, SMALL, self.theme.muted, cell + gap - 4)
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            top = head + i * (cell + gap)
            self._label(sheet, draw, label, top, cell)
            for j, picture in enumerate(row):
                if picture is not None:
                    sheet.paste(picture, (px(LABEL + j * (cell + gap)), px(top)))
        return sheet

    def _label(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, label: Label, top: float, cell: float) -> None:
        line = FONT + 4
        y = top + max(0.0, (cell - line * len(label.lines)) / 2)
        left = 0
        if label.swatch is not None:
            fill = tuple((label.swatch * 255).round().int().tolist())
            draw.rounded_rectangle([self._px(v) for v in (0, y + 2, FONT, y + 2 + FONT)], self._px(3), fill=fill)
            left = FONT + 7
        for k, text in enumerate(label.lines):
            size, color = (FONT, self.theme.ink) if k == 0 else (SMALL, self.theme.muted)
            self._text(draw, left, y + k * line, text, size, color, LABEL - left - 10, bold=k == 0)
        if label.bar is not None:
            y += line * len(label.lines) + 4
            bar = image_of(label.bar).resize((self._px(LABEL - 24), self._px(8)))
            sheet.paste(bar, (0, self._px(y)))

    def _text(
        self, draw: Any, x: float, y: float, text: str, size: float, color: str, width: float, bold: bool = False
    ) -> None:
        file, letters = lettering(text, bold)
        font, text = ImageFont.truetype(file, self._px(size)), "".join(letters)
        while len(text) > 3 and draw.textlength(text, font) > width * self.scale:
            text = shortened(letters, len(text) - 1)
        draw.text((self._px(x), self._px(y)), text, fill=color, font=font)

    def _px(self, value: float) -> int:
        return round(value * self.scale)


def cell_width(columns: int, gap: int = 8, most: int = 230) -> int:
    return min(most, (WIDTH - LABEL + gap) // columns - gap)


def token_map_sheet(
    photos: list[Tensor], codes: Tensor, colors: Tensor, names: list[str], theme: Theme, scale: float
) -> Image.Image:
    """Photographs, their token maps, and both laid over each other.

    Args:
        photos: [3, S, S] in [0, 1], S a multiple of the grid. codes: [photos, h, w]. colors: [K, 3].
    """
    maps = [token_map(c, photo.shape[1] // c.shape[0], colors) for photo, c in zip(photos, codes, strict=True)]
    both = [_over(photo, m) for photo, m in zip(photos, maps, strict=True)]
    labels = [Label(["photograph"]), Label(["token map", "one color", "per code"]), Label(["both"])]
    rows = [[image_of(x) for x in row] for row in (photos, maps, both)]
    return Sheet(theme, scale).draw(rows, labels, names, cell_width(len(photos)))


def mask_sheet(
    photos: list[Tensor], masks: Tensor, codes: Tensor, guesses: Tensor, colors: Tensor, names: list[str],
    theme: Theme, scale: float,
) -> Image.Image:  # fmt: skip
    """A row for each photograph: itself, what the student sees, the codes asked for, the student's guesses.

    Args:
        masks: [photos, h, w] bool. codes, guesses: [photos, h, w].
    """
    rows, labels = [], []
    for i, (photo, mask) in enumerate(zip(photos, masks, strict=True)):
        cell = photo.shape[1] // mask.shape[0]
        dim = DIMMED * photo + (1 - DIMMED) * torch.tensor(theme.rgb(theme.paper)).view(3, 1, 1)
        seen = image_of(masked_picture(photo, mask))
        asked, guessed = (image_of(masked_picture(dim, mask, token_map(c[i], cell, colors))) for c in (codes, guesses))
        right = mask & (codes[i] == guesses[i])
        rows.append([image_of(photo), seen, asked, _dots(guessed, right, cell)])
        hidden = f"{int(mask.sum())} of {mask.numel()} hidden"
        labels.append(Label([names[i], hidden, f"{int(right.sum())} guessed right"]))
    columns = [
        "photograph (a crop)",
        "what the student sees",
        "hidden codes: the tokenizer's",
        "hidden codes: the student's",
    ]
    return Sheet(theme, scale).draw(rows, labels, columns, cell_width(len(columns)))


def patch_picture(photo: Image.Image, grid: tuple[int, int], patch: int, side: int, theme: Theme) -> Image.Image:
    """A patch of the center square, framed, with half a patch around it (moved inwards at the photograph's edge)."""
    square = min(photo.size)
    left, top = (photo.width - square) / 2, (photo.height - square) / 2
    h, w = square / grid[0], square / grid[1]
    row, column = divmod(patch, grid[1])
    y, x = top + row * h, left + column * w
    view = min(2 * max(h, w), square)
    y0 = min(max(y + h / 2 - view / 2, 0), photo.height - view)
    x0 = min(max(x + w / 2 - view / 2, 0), photo.width - view)
    bicubic = Image.Resampling.BICUBIC
    picture = photo.convert("RGB").resize((side, side), bicubic, box=(x0, y0, x0 + view, y0 + view))
    zoom = side / view
    box = [round((x - x0) * zoom), round((y - y0) * zoom), round((x - x0 + w) * zoom), round((y - y0 + h) * zoom)]
    draw, line = ImageDraw.Draw(picture), max(1, round(side / 55))
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    draw.rectangle([left, top, right, bottom], outline=theme.accent, width=line)
    draw.rectangle([left + line, top + line, right - line, bottom - line], outline="#ffffff", width=max(1, line // 2))
    return picture


def code_sheet(
    images: ImageList, codes: Tensor, grid: tuple[int, int], usage: CodeUsage, rows: list[int], colors: Tensor,
    theme: Theme, scale: float, *, columns: int = 12, seed: int = 0,
) -> Image.Image:  # fmt: skip
    """A row for each code: how often it occurs, and patches that have it.

    Args:
        codes: [images, N]. rows: the codes to show.
    """
    gap = 6
    cell = cell_width(columns, gap)
    pictures, labels = [], []
    rank = {code: i + 1 for i, code in enumerate(usage.ranking.tolist())}
    for code in rows:
        found = choose_patches(codes, code, columns, seed)
        photos = (images.open(image) for image, _ in found)
        side = round(cell * scale)
        pictures.append([patch_picture(p, grid, at, side, theme) for p, (_, at) in zip(photos, found, strict=True)])
        lines = [f"code {code}", f"#{rank[code]}: {usage.shares[code]:.2%}", f"{int(usage.counts[code]):,} ×"]
        labels.append(Label(lines, colors[code]))
    return Sheet(theme, scale).draw(pictures, labels, [], cell, gap)


def squares(photos: Iterable[Image.Image], size: int) -> list[Tensor]:
    """The center squares that the models see, [3, size, size] in [0, 1]."""
    view = EvalView(size, 1.0)
    return [view(photo)["image"] for photo in photos]


def display_size(grid: tuple[int, int], columns: int, scale: float) -> int:
    """Pixels of a photograph in a sheet of this many columns: the most that fit and divide into the grid."""
    return max(1, int(cell_width(columns) * scale) // grid[0]) * grid[0]


def _over(photo: Tensor, colors: Tensor) -> Tensor:
    """The photograph's lightness in the colors of the token map."""
    gray = photo.mean(0, keepdim=True)
    return (0.55 * gray + 0.45 * colors * (0.4 + 0.6 * gray)).clamp(0, 1)


def image_of(picture: Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def _dots(picture: Image.Image, where: Tensor, cell: int) -> Image.Image:
    draw = ImageDraw.Draw(picture)
    radius = max(1.5, cell * 0.16)
    for row, column in where.nonzero().tolist():
        x, y = (column + 0.5) * cell, (row + 0.5) * cell
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill="#ffffff", outline="#1c2128",
                     width=max(1, cell // 16))  # fmt: skip
    return picture


ROWS, GAP = 3, 8
CAPTION = (
    "Photograph, truth and prediction of images that the training has not seen. Every class has a color; what counts "
    "for nothing stays dark."
)


def overlay_sheet(run: Path) -> Image.Image | None:
    """Some of the pictures in ``run``/overlays, one below the other at the width of the first; None without any."""
    files = sorted((run / "overlays").glob("*.png"))
    chosen = [files[i * len(files) // ROWS] for i in range(ROWS)] if len(files) > ROWS else files
    pictures = [Image.open(file).convert("RGB") for file in chosen]
    if not pictures:
        return None
    width = pictures[0].width
    return stack([p.resize((width, max(round(p.height * width / p.width), 1))) for p in pictures], "white", GAP)


def stack(pictures: list[Image.Image], paper: str, gap: int = 0) -> Image.Image:
    """Pictures below one another."""
    height = sum(p.height + gap for p in pictures) - gap
    whole = Image.new("RGB", (max(p.width for p in pictures), height), paper)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + gap
    return whole
