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


@functools.cache
def lettering(text: str, bold: bool = False) -> tuple[str, str]:
    """(A font's file, the text to draw with it): DejaVu Sans, or the first installed font that has every character.

    If no font has, those that DejaVu Sans lacks are escaped (\\u732b), for boxes tell no two names apart.
    """
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts

    usual = str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"))
    lacking = set(text) - _characters(usual)
    for file in sorted(findSystemFonts()) if lacking else ():
        if set(text) <= _characters(file):
            return file, text
    return usual, "".join(c.encode("unicode_escape").decode() if c in lacking else c for c in text)


def _characters(file: str) -> set[str]:
    """Of a font; none of one that has no outlines, as some have for emoji in color."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(file, 20)
        return set(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):
        return set()
