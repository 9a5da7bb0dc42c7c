"""Colors and width that the report's page, curves and sheets share, for light and dark screens."""

from __future__ import annotations

from dataclasses import dataclass

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
