"""Colors, width and letters that the report's page, curves and sheets share, for light and dark screens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

WIDTH = 1080  # of the page's column, in CSS pixels


@dataclass(frozen=True)
class Theme:
    name: str
    page: str  # behind the cards
    paper: str  # the cards, and the background of every picture
    ink: str
    muted: str
    line: str
    accent: str
    second: str

    @staticmethod
    def rgb(color: str) -> tuple[float, float, float]:
        """'#rrggbb' -> three numbers in [0, 1]."""
        r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return r, g, b

    def css(self) -> str:
        names = ("page", "paper", "ink", "muted", "line", "accent", "second")
        return " ".join(f"--{name}: {getattr(self, name)};" for name in names)


LIGHT = Theme("light", "#f3f5f8", "#ffffff", "#1b222c", "#5d6875", "#dbe0e6", "#2563c9", "#d9700a")
DARK = Theme("dark", "#0f1216", "#171b21", "#e4e8ee", "#97a3b2", "#2c333d", "#6ba5ff", "#ffac54")


def lettering(text: str, bold: bool = False) -> tuple[str, list[str]]:
    """(A font's file, what to draw with it for each character): DejaVu Sans, or an installed font that has them all.

    If none has, those that DejaVu Sans lacks are escaped (\\u732b), for boxes tell no two names apart.
    """
    from matplotlib import get_data_path

    usual = str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"))
    wanted = {c for c in text if c.isprintable()}
    files = () if wanted <= _characters(usual) else _installed(bold)
    file = next((file for file in files if wanted <= _characters(file)), usual)
    drawn = wanted & _characters(file)
    return file, [c if c in drawn else c.encode("unicode_escape").decode() for c in text]


@functools.cache
def _installed(bold: bool) -> list[str]:
    """Fonts, those of the weight first and slanted ones last."""
    from matplotlib.font_manager import findSystemFonts

    def rank(file: str) -> tuple[bool, bool, str]:
        name = Path(file).stem.lower()
        return any(s in name for s in ("italic", "oblique", "black", "thin")), ("bold" in name) != bold, file

    return sorted((file for file in findSystemFonts() if "LastResort" not in file), key=rank)


@functools.cache
def _characters(file: str) -> frozenset[str]:
    """Of a font; none of one that has no outlines, as some have for emoji in color."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(file, 20)
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def shortened(letters: list[str], most: int) -> str:
    """The characters, or of too many the beginning and the end, by which names differ."""
    if sum(map(len, letters)) <= most:
        return "".join(letters)
    first: list[str] = []
    last: list[str] = []
    for near, far in zip(letters, reversed(letters), strict=True):
        if sum(map(len, (*first, *last, near, far))) > most - 3:
            break
        first.append(near)
        last.append(far)
    return "".join((*first, "...", *reversed(last)))
