"""The plots of a report: the ops beside their peers, training steps, the search as its problem grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.gpu.records import Record, Records, device_ms
from bench.harness import OURS

OPS = ("search", "quantizer", "head", "attention")
MOST_GROUPS = 9
COLOR, GRAY = "tab:orange", "tab:gray"


def write(records: Records, folder: Path) -> dict[str, Path]:
    """By title: the files that were written; none without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return {}
    found = {}
    for title, name, draw in (
        ("Device time of each op beside its peers, ms", "ops", _ops),
        ("Training steps, images per second", "steps", _steps),
        ("The search as N, K and D grow, ms", "scaling", _scaling),
    ):
        figure = draw(records)
        if figure is not None:
            figure.suptitle(title)
            figure.savefig(folder / f"{name}.png", dpi=110)
            found[title] = folder / f"{name}.png"
    return found


def _figure(rows: int, columns: int, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(7 * columns, height * rows), layout="constrained")


def _bars(axes: Any, names: list[str], values: list[float], ours: list[bool], title: str) -> None:
    bars = axes.barh(range(len(names)), values, color=[COLOR if own else GRAY for own in ours])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.set_title(title, fontsize=8)
    axes.margins(x=0.18)


def _ops(records: Records) -> Any:
    groups = [(section, group) for section in OPS for group in records.groups(section)][:MOST_GROUPS]
    if not groups:
        return None
    figure = _figure(-(-len(groups) // 2), 2, 3.2)
    for at, (section, group) in enumerate(groups):
        rows = [r for r in records.of(section, group=group) if "wall_ms" in r]
        rows.sort(key=device_ms, reverse=True)
        axes = figure.add_subplot(-(-len(groups) // 2), 2, at + 1)
        own = [r["what"].startswith(records.base(section)) for r in rows]
        _bars(axes, [r["what"][:44] for r in rows], [device_ms(r) for r in rows], own, f"{section}: {group}")
        axes.tick_params(axis="x", which="both", labelbottom=False)  # the bars have their numbers
    return figure


def _steps(records: Records) -> Any:
    rows = [r for s in ("steps", "compiled") for r in records.of(s) if "images_s" in r][::-1]
    if not rows:
        return None
    figure = _figure(1, 1, 1 + 0.32 * len(rows))
    names = [f"{r['group'].removesuffix(', bf16')}: {r['what'][:24]}" for r in rows]
    speeds = [r["images_s"] for r in rows]
    _bars(figure.add_subplot(), names, speeds, [r["what"] == OURS for r in rows], "")
    return figure


def _scaling(records: Records) -> Any:
    rows = [r for r in records.of("scaling") if "wall_ms" in r]
    if not rows:
        return None
    axes_names = list(dict.fromkeys(r["axis"] for r in rows))
    figure = _figure(1, len(axes_names), 4.5)
    for at, axis in enumerate(axes_names):
        axes = figure.add_subplot(1, len(axes_names), at + 1)
        lines: dict[str, list[Record]] = {}
        for r in rows:
            if r["axis"] == axis:
                lines.setdefault(r["what"], []).append(r)
        for name, points in lines.items():
            width = 3 if name == OURS else 1.5
            axes.plot([p["value"] for p in points], [device_ms(p) for p in points], "o-", label=name, linewidth=width)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure
