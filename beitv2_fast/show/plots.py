"""The report's curves: panels side by side, drawn by matplotlib in the page's colors."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..errors import require
from ..models.student import BRANCHES
from .codes import CodeUsage
from .sheets import stack
from .theme import WIDTH, Theme, lettering, shortened

SMOOTH_FROM = 200  # points from which a moving average is drawn over the raw curve
MORE = ("#2f9e6e", "#c2417c", "#8a63d2", "#8f8a2c", "#3aa7b8")  # after the theme's two, for both themes
HEIGHT = 250  # CSS pixels
FONT = 12
NAME = 32  # characters of a name in a legend; of a longer one its beginning and end

Metrics = list[dict[str, float]]


@dataclass(frozen=True)
class Curve:
    name: str
    y: list[float]
    x: list[float]


@dataclass
class Panel:
    """Curves over epochs, or bars; ``levels`` are dashed horizontal lines with a text."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    levels: list[tuple[float, str]] = field(default_factory=list)
    percent: bool = False
    zero: bool = False  # the axis starts at zero
    bars: CodeUsage | None = None


def curve(metrics: Metrics, name: str, key: str, of: Callable[[float], float] = lambda y: y) -> list[Curve]:
    """One curve, or none if the log has no such value (``[*curve(...), *curve(...)]`` leaves it out)."""
    found = [(line.get("epoch", line["step"]), of(line[key])) for line in metrics if key in line]
    return [Curve(name, [y for _, y in found], [x for x, _ in found])] if found else []


def rate_panel(metrics: Metrics) -> Panel:
    return Panel("learning rate, thousandths", curve(metrics, "lr", "lr", lambda y: 1000 * y), zero=True)


def tokenizer_panels(metrics: Metrics) -> list[Panel]:
    return [
        Panel("similarity to the teacher (cosine)", curve(metrics, "similarity", "rec_loss", lambda y: 1 - y)),
        Panel("loss", [*curve(metrics, "whole", "loss"), *curve(metrics, "commitment", "commit_loss")], zero=True),
        rate_panel(metrics),
    ]


def codebook_panels(metrics: Metrics, usage: CodeUsage | None) -> list[Panel]:
    levels = [] if usage is None else [(usage.perplexity, "photographs, now")]
    panels = [
        Panel("codes used, share of the codebook", curve(metrics, "used", "used_codes"), percent=True, zero=True),
        Panel("perplexity", curve(metrics, "perplexity", "perplexity"), levels, zero=True),
    ]
    return panels if usage is None else [*panels, Panel("how often each code occurs, sorted", bars=usage)]


def pretrain_panels(metrics: Metrics, usage: CodeUsage | None) -> list[Panel]:
    """Losses and accuracies; usage: of the codes asked for, to show what a guess gains that knows nothing else."""
    guess = [] if usage is None else [(usage.entropy, "frequencies only")]
    share = [] if usage is None else [(float(usage.shares.max()), "most frequent code")]
    names = list(zip(BRANCHES, ("mim", "agg"), strict=True))
    return [
        Panel("loss (cross entropy)", [c for n, k in names for c in curve(metrics, n, f"loss_{k}")], guess),
        Panel("masked tokens right", [c for n, k in names for c in curve(metrics, n, f"accuracy_{k}")], share,
              percent=True, zero=True),
        rate_panel(metrics),
    ]  # fmt: skip


COMPARED = (  # title, key of metrics.jsonl, what is drawn of it, is it a share, does the axis start at zero
    ("similarity to the teacher (cosine)", "rec_loss", lambda y: 1 - y, False, False),
    ("perplexity of the codes", "perplexity", None, False, True),
    ("codes used, share of the codebook", "used_codes", None, True, True),
    ("loss, last layer", "loss_mim", None, False, False),
    ("masked tokens right, last layer", "accuracy_mim", None, True, True),
    ("masked tokens right, aggregation branch", "accuracy_agg", None, True, True),
    ("loss", "loss", None, False, False),
    ("learning rate, thousandths", "lr", lambda y: 1000 * y, False, True),
    ("images per second", "images_per_second", None, False, True),
)


def compared_panels(runs: dict[str, Metrics]) -> list[Panel]:
    """What the logs of several runs have, each run a curve of its name; what no run logs is left out."""
    panels = []
    for title, key, of, percent, zero in COMPARED:
        curves = [c for name, metrics in runs.items() for c in curve(metrics, name, key, of or (lambda y: y))]
        if curves:
            panels.append(Panel(title, curves, percent=percent, zero=zero))
    return panels


def draw_panels(panels: Iterable[Panel], theme: Theme, scale: float) -> Image.Image:
    """All panels that have something to show, side by side, as wide as the page."""
    matplotlib = require("matplotlib", "demo", "The report's curves")
    from matplotlib.figure import Figure

    panels = [p for p in panels if p.curves or p.bars]
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100 * scale, layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.08, h_pad=0.04, wspace=0.03)
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            axes.set_title(panel.title, loc="left", pad=8)
            if panel.bars:
                _draw_bars(axes, panel.bars, theme)
            else:
                _draw_curves(axes, panel, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100 * scale)
    return Image.open(buffer).convert("RGB")


def draw_rows(panels: Sequence[Panel], theme: Theme, scale: float, columns: int = 3) -> Image.Image:
    """``draw_panels``, in rows of ``columns``."""
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return stack([draw_panels(row, theme, scale) for row in rows], theme.paper)


def _draw_curves(axes: Any, panel: Panel, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    # Every second one is dashed, so that of two near-equal curves the first shows through.
    styles = itertools.cycle(("-", (0, (5, 1.5))))
    for c, color, dash in zip(panel.curves, itertools.cycle((theme.accent, theme.second, *MORE)), styles, strict=False):
        if len(c.y) >= SMOOTH_FROM:
            axes.plot(c.x, c.y, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(c.x, _smoothed(c.y), color=color, linewidth=1.8, linestyle=dash, label="curve")
        else:
            marker = "o" if len(c.y) == 1 else None
            axes.plot(c.x, c.y, color=color, linewidth=1.8, linestyle=dash, marker=marker, label="curve")
    for y, _ in panel.levels:
        axes.axhline(y, color=theme.muted, linewidth=1, linestyle=(0, (2, 2)), label="level")
    if panel.zero:
        axes.set_ylim(bottom=0)
        axes.set_ylim(top=axes.get_ylim()[1] * 1.04)
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
    names = [c.name for c in panel.curves] + [text for _, text in panel.levels]
    if len(names) > 1:
        for text, name in zip(axes.legend(loc="best", handlelength=1.8).get_texts(), names, strict=True):
            _letter(text, name)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=panel.curves[0].x[-1] >= 4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("epoch")


def _letter(text: Any, name: str) -> None:
    """A name in the legend, as it is: of labels matplotlib leaves out `_a`, and reads `$1$` as a formula."""
    from matplotlib.font_manager import FontProperties

    file, letters = lettering(name)
    text.set(
        text=shortened(letters, NAME), parse_math=False, fontproperties=FontProperties(fname=file, size=text.get_size())
    )


def _draw_bars(axes: Any, usage: CodeUsage, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    shares = usage.shares[usage.ranking][: usage.used].tolist()
    edges = [i + 0.5 for i in range(len(shares) + 1)]
    axes.stairs(shares, edges, fill=True, color=theme.accent, alpha=0.85, linewidth=0)
    axes.axhline(1 / usage.num_codes, color=theme.muted, linewidth=1, linestyle=(0, (2, 2)), label="all codes equal")
    axes.set_xlim(0.5, max(usage.num_codes, 2) + 0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"rank of the code (1 to {usage.num_codes:,})")
    axes.legend(loc="upper right", handlelength=1.8)


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a centered window of a fiftieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 100)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _style(theme: Theme) -> dict[str, object]:
    return {
        "font.size": FONT * 0.72,  # points at 100 dpi
        "axes.titlesize": FONT * 0.76,
        "axes.titleweight": "bold",
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.line,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "axes.grid": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "legend.frameon": False,
    }
