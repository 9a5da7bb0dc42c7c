"""Sheets of what happens inside one photograph: attention of a patch, similarity to the teacher, nearest patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.images import ImageList
from ..pictures import heat_map
from .attention import KEPT, most_attended
from .sheets import Label, Sheet, cell_width, image_of, patch_picture, stack
from .theme import Theme

MOST_COLUMNS = 6  # most pictures in a row
BAR = torch.linspace(0, 1, 64)[None]  # values of a color bar
OVER = 0.7  # share of the heat where it lies over a photograph


def attention_columns(heads: int) -> int:
    """Columns of the sheet for this many heads."""
    return min(MOST_COLUMNS, heads + 2)


def attention_sheet(
    photo: Tensor, heads: Tensor, patch: int, what: str, theme: Theme, scale: float, share: float = KEPT
) -> Image.Image:
    """The photograph with the query patch marked, the mean of all heads, each head, and what holds most of each.

    Args:
        photo: [3, S, S] in [0, 1], S a multiple of the grid. heads: [H, h, w], attention of the patch. what: the
            model and layer, with a comma between. share: of a head's attention that the kept patches hold.
    """
    mean = heads.mean(0)
    kept = most_attended(torch.stack([mean, *heads]), share)
    heat = [_marked(_lit(photo, values / values.max()), patch, mean.shape, theme) for values in (mean, *heads)]
    dark = [_marked(darkened(photo, k), patch, mean.shape, theme) for k in kept]
    names = ["mean of the heads", *(f"head {i + 1}" for i in range(len(heads)))]
    columns = attention_columns(len(heads))
    photograph = _marked(photo, patch, mean.shape, theme), "photograph"
    rows = []
    for start in range(0, len(names), columns - 1):
        part = slice(start, start + columns - 1)
        lead, title = photograph if start == 0 else (None, "")
        label = Label([*what.split(", "), "0 to the most:"], bar=_heat(BAR, 1))
        rows.append((label, [lead, *heat[part]], [title, *names[part]]))
        label = Label([f"{share:.0%}", "of each head's", "attention"])
        rows.append((label, [None, *dark[part]], ["", *(f"{name}, {share:.0%}" for name in names[part])]))
    return _with_headings(rows, columns, theme, scale)


def similarity_sheet(
    photos: list[Tensor], values: Tensor, names: list[str], theme: Theme, scale: float
) -> Image.Image:  # fmt: skip
    """A column for each photograph: itself, and the cosine of every patch (0 black, 1 pale) over it.

    Args:
        photos: [3, S, S] in [0, 1]. values: [photos, h, w].
    """
    over = [_over(photo, v) for photo, v in zip(photos, values, strict=True)]
    heads = [f"{name}: {float(v.mean()):.3f}" for name, v in zip(names, values, strict=True)]
    labels = [Label(["photograph", "name: mean"]), Label(["similarity", "0 to 1:"], bar=heat_map(BAR, 1))]
    return Sheet(theme, scale).draw([[image_of(p) for p in photos], [image_of(o) for o in over]], labels, heads,
                                    cell_width(len(photos)))  # fmt: skip


def nearest_sheet(
    photo: Image.Image, patch: int, images: ImageList, found: list[dict[str, Any]], grid: tuple[int, int],
    what: str, theme: Theme, scale: float,
) -> Image.Image:  # fmt: skip
    """The query patch, then the nearest patches of the data set with their cosines, each framed in its surroundings.

    Args:
        found: dicts of image, patch, cosine, the nearest first.
    """
    columns = 7
    side = round(cell_width(columns) * scale)
    pictures = [patch_picture(photo, grid, patch, side, theme)]
    pictures += [patch_picture(images.open(row["image"]), grid, row["patch"], side, theme) for row in found]
    texts = ["the patch", *(f"{row['cosine']:.2f}" for row in found)]
    rows = []
    for start in range(0, len(pictures), columns):
        part = slice(start, start + columns)
        label = Label([f"by the {what}", "patches in their", "surroundings;", "number: cosine"] if start == 0 else [""])
        rows.append((label, pictures[part], texts[part]))
    return _with_headings(rows, columns, theme, scale)


def _with_headings(
    rows: Sequence[tuple[Label, Sequence[Image.Image | None], list[str]]], columns: int, theme: Theme, scale: float
) -> Image.Image:
    """Rows of (label, pictures, a heading for each), in this many columns."""
    sheet, gap = Sheet(theme, scale), 8
    drawn = [sheet.draw([pictures], [label], heads, cell_width(columns, gap), gap) for label, pictures, heads in rows]
    return stack(drawn, theme.paper, round(gap * scale))


def _over(photo: Tensor, values: Tensor) -> Tensor:
    heat = heat_map(values, photo.shape[1] // values.shape[0])
    return OVER * heat + (1 - OVER) * photo


def _lit(photo: Tensor, values: Tensor) -> Tensor:
    """The photograph, the darker the less a patch is attended to, and in the colors of heat the more it is."""
    cell = photo.shape[1] // values.shape[0]
    share = values.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return torch.lerp(photo * (0.5 + 0.5 * share), _heat(values, cell), 0.1 + 0.65 * share)


def _heat(values: Tensor, cell: int) -> Tensor:
    """The middle of the colors of heat: what lies over a photograph should not be black."""
    return heat_map(0.35 + 0.5 * values, cell)


def darkened(photo: Tensor, kept: Tensor) -> Tensor:
    """The photograph, dark where a patch is not kept."""
    cell = photo.shape[1] // kept.shape[0]
    shown = kept.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return torch.where(shown, photo, 0.2 * photo)


def _marked(picture: Tensor, patch: int, grid: torch.Size, theme: Theme) -> Image.Image:
    """With a frame around a patch."""
    image = image_of(picture)
    cell, width = image.width // grid[1], max(2, image.width // 100)
    row, column = divmod(patch, grid[1])
    box = [column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1]
    draw = ImageDraw.Draw(image)
    draw.rectangle(box, outline="#ffffff", width=width)
    draw.rectangle([box[0] + width, box[1] + width, box[2] - width, box[3] - width], outline=theme.accent, width=width)
    return image
