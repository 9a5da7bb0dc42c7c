"""Results of several seeds as a Markdown table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beitv2_fast.errors import require
from beitv2_fast.show.theme import LIGHT, WIDTH

PANELS = 6  # side by side

Table = dict[str, dict[str, list[float]]]  # row -> column -> one number per seed


@dataclass(frozen=True)
class Column:
    """key: in a table's rows. percent: shown so. empty: said where a row has no number."""

    key: str
    title: str
    percent: bool = True
    digits: int = 1
    empty: str = "—"

    def text(self, value: float) -> str:
        return f"{100 * value if self.percent else value:.{self.digits}f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1 in the denominator); 0 of one."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))


def cell(values: Sequence[float], column: Column) -> str:
    """Mean ± deviation; of a single seed only the number."""
    if not values:
        return column.empty
    spread = f" ± {column.text(deviation(values))}" if len(values) > 1 else ""
    return f"{column.text(mean(values))}{spread}"


def markdown(first: str, table: Table, columns: Sequence[Column]) -> str:
    """A Markdown table; ``first`` is the title of the rows' names."""
    titles = [column.title + (", %" if column.percent else "") for column in columns]
    lines = [f"| {first} | {' | '.join(titles)} |", "|" + "---|" * (len(columns) + 1)]
    for name, row in table.items():
        lines.append(f"| {name} | {' | '.join(cell(row.get(c.key, []), c) for c in columns)} |")
    return "\n".join(lines) + "\n"


def plot(
    table: Table,
    columns: Sequence[Column],
    file: Path,
    *,
    title: str = "",
    aside: Sequence[str] = (),
    scale: float = 1.5,
) -> None:
    """One panel per column with numbers: a row's seeds as dots, their mean as a bar mark, its deviation as a line.

    aside: rows whose number is written instead, so that the others are not squeezed by them.
    """
    require("matplotlib", "demo", "The plot")
    import matplotlib
    from matplotlib.figure import Figure

    columns = [c for c in columns if any(row.get(c.key) for row in table.values())]
    names = list(table)
    lines = -(-len(columns) // PANELS)
    wide = -(-len(columns) // lines)
    height = lines * (0.75 + 0.34 * len(names)) + (0.25 if title else 0)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 100, height), dpi=100 * scale, layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=LIGHT.ink)
        panels = figure.subplots(lines, wide, sharey=True, squeeze=False).flatten()
        for axes, column in zip(panels, columns, strict=False):
            _panel(axes, table, names, column, aside)
        for axes in panels[len(columns) :]:
            axes.set_visible(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100 * scale)


def _panel(axes: Any, table: Table, names: Sequence[str], column: Column, aside: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    factor = 100 if column.percent else 1
    for y, name in enumerate(names):
        values = [factor * v for v in table[name].get(column.key, [])]
        if not values or name in aside:
            said = cell(table[name].get(column.key, []), column)
            axes.text(0.5, y, said, transform=axes.get_yaxis_transform(), ha="center", va="center",
                      color=LIGHT.ink if values else LIGHT.muted)  # fmt: skip
            continue
        middle, spread = mean(values), deviation(values)
        axes.plot([middle - spread, middle + spread], [y, y], color=LIGHT.accent, linewidth=1.6, alpha=0.6)
        axes.plot(values, [y] * len(values), "o", color=LIGHT.second, markersize=3.5, alpha=0.85, linestyle="none")
        axes.plot([middle], [y], "|", color=LIGHT.accent, markersize=13, markeredgewidth=2.4)
    axes.set_title(column.title + (", %" if column.percent else ""), loc="left", pad=6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT.ink)


_STYLE: Any = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlecolor": LIGHT.ink,
    "text.color": LIGHT.ink, "axes.edgecolor": LIGHT.line, "xtick.color": LIGHT.line, "xtick.labelcolor": LIGHT.muted,
    "axes.grid": True, "grid.color": LIGHT.line, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip


def ordering(table: Table, higher: str, lower: str, column: Column) -> str:
    """Whether a row is above another, and by how much beside the seeds' deviation, in words."""
    a, b = (table.get(name, {}).get(column.key, []) for name in (higher, lower))
    if not a or not b:
        return "not measured"
    gap = mean(a) - mean(b)
    noise = math.hypot(deviation(a), deviation(b))
    said = "yes" if gap > 0 else "NO"
    size = f"{column.text(mean(a))} against {column.text(mean(b))}"
    if min(len(a), len(b)) < 2:
        return f"{said}: {size} (one seed)"
    return f"{said}: {size}{'' if abs(gap) > noise else ', within the seeds’ deviation'}"
