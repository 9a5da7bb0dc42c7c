"""The report's HTML: one file without scripts, pictures inside, for light and dark screens."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image, features

from ..theme import DARK, LIGHT, WIDTH

PHOTO_QUALITY = 84

CSS = f"""
:root {{ color-scheme: light dark; {LIGHT.css()} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK.css()} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: {WIDTH + 100}px; margin: 0 auto; padding: 28px 20px 60px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.015em; }}
h2 {{ font-size: 21px; line-height: 1.3; margin: 0 0 6px; letter-spacing: -.01em; }}
p {{ max-width: 82ch; margin: 0 0 12px; }}
header p {{ font-size: 17px; max-width: 100ch; }}
.muted, figcaption, .tile span, .tile small {{ color: var(--muted); }}
nav {{ margin: 14px 0 4px; font-size: 14.5px; }}
nav a {{ margin-right: 16px; }}
a {{ color: var(--accent); text-decoration: none; }}
a:hover {{ text-decoration: underline; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; margin: 18px 0; }}
.tile, section {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }}
.tile {{ padding: 12px 16px; }}
.tile b {{ display: block; font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }}
.tile span {{ display: block; font-size: 14px; }}
.tile small {{ display: block; font-size: 13px; line-height: 1.4; margin-top: 3px; }}
section {{ padding: 20px 29px 18px; margin: 18px 0; }}
figure {{ margin: 6px 0 8px; }}
figure img {{ display: block; width: 100%; max-width: {WIDTH}px; height: auto; }}
figcaption {{ font-size: 14.5px; line-height: 1.5; max-width: 100ch; margin: 0 0 14px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 6px 22px 6px 0; border-bottom: 1px solid var(--line); }}
th {{ color: var(--muted); font-weight: 500; font-size: 14px; }}
td.number, th.number {{ text-align: right; white-space: nowrap; }}
tr.own td {{ font-weight: 650; }}
.bar {{ display: block; width: 340px; height: 12px; border-radius: 3px; background: var(--page);
  border: 1px solid var(--line); overflow: hidden; }}
.bar i {{ display: block; height: 100%; background: var(--muted); opacity: .55; }}
tr.own .bar i {{ background: var(--accent); opacity: 1; }}
.note {{ border-left: 3px solid var(--second); padding: 2px 0 2px 12px; margin: 12px 0; }}
details {{ margin: 12px 0; }}
summary {{ cursor: pointer; color: var(--accent); font-size: 15px; }}
pre {{ overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px;
  white-space: pre-wrap; }}
@media print {{ section, .tile {{ break-inside: avoid-page; }} nav {{ display: none; }} }}
"""


@dataclass(frozen=True)
class Figure:
    """A figure of the report, for light and dark screens. ``photo``: it may be compressed with loss in the page."""

    name: str
    light: Image.Image
    dark: Image.Image
    alt: str
    photo: bool = False

    def html(self, caption: str) -> str:
        """caption: text."""
        width, height = self.light.size
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{self._inline(self.dark)}">'
        img = f'<img src="{self._inline(self.light)}" width="{width}" height="{height}" alt="{escape(self.alt)}">'
        return f"<figure><figcaption>{_with_code(caption)}</figcaption><picture>{dark}{img}</picture></figure>"

    def _inline(self, image: Image.Image) -> str:
        kind = "webp" if self.photo and features.check("webp") else "png"
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"quality": PHOTO_QUALITY, "method": 4} if kind == "webp" else {"optimize": True}))
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Section:
    """anchor, heading, and the HTML below it."""

    anchor: str
    heading: str
    body: list[str]


def page(title: str, intro: list[str], tiles: list[str], sections: list[Section]) -> str:
    links = "".join(f'<a href="#{s.anchor}">{escape(s.heading)}</a>' for s in sections)
    bodies = "\n".join(
        f'<section id="{s.anchor}"><h2>{escape(s.heading)}</h2>\n' + "\n".join(s.body) + "\n</section>"
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{"".join(intro)}
<nav>{links}</nav>
</header>
<div class="tiles">{"".join(tiles)}</div>
{bodies}
</main>
</body>
</html>
"""


def paragraph(text: str, kind: str = "") -> str:
    """Text as a paragraph."""
    return f'<p class="{kind}">{_with_code(text)}</p>' if kind else f"<p>{_with_code(text)}</p>"


def _with_code(text: str) -> str:
    """Plain text, in which `what stands in backticks` is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def note(text: str) -> str:
    """Something missing or unfinished."""
    return paragraph(text, "note")


def number_tile(name: str, value: str, remark: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>'


def table(head: list[str], rows: list[list[str]], own: int = 0) -> str:
    """Plain text cells; all columns but the first are numbers; the first ``own`` rows stand out."""
    kinds = ["", *[' class="number"'] * (len(head) - 1)]
    top = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, head, strict=True))
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td{k}>{escape(c)}</td>" for k, c in zip(kinds, row, strict=True))
        body += f"<tr{' class=own' if i < own else ''}>{cells}</tr>"
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def probe_cells(results: dict[str, Any]) -> list[list[str]]:
    """The probe's table: a heading, then a row for each of the features, linear probe beside nearest neighbors."""
    rows = results["rows"]
    near = list(rows[0].get("knn", {})) if rows else []
    cells = [["features", "linear", *(f"{k}-NN" for k in near)]]
    for row in rows:
        numbers = [(row["mean"], row["std"]), *((row["knn"][k], row.get("knn_std", {}).get(k, 0.0)) for k in near)]
        told = (f"{mean:.3f} ± {std:.3f}" if std else f"{mean:.3f}" for mean, std in numbers)
        cells.append([str(row["features"]), *told])
    return cells


def sampling_error(results: dict[str, Any]) -> list[str]:
    """What the number of test images leaves open, in a sentence."""
    if "error" not in results:
        return []
    count, error = results["images"]["test"], results["error"]
    return [f"The {count:,} test images leave each number a standard error of up to {error:.3f}."]


def results_table(results: dict[str, Any]) -> str:
    """The probe's rows, with a bar of the linear probe from chance to 1."""
    chance = float(results.get("chance", 0))
    (features, *names), *body = probe_cells(results)
    rows = ""
    for row, (name, *numbers) in zip(results["rows"], body, strict=True):
        filled = max(0.0, min(1.0, (row["mean"] - chance) / max(1 - chance, 1e-9)))
        rows += (
            f"<tr{' class=own' if name.startswith('pre-trained') else ''}><td>{escape(name)}</td>"
            + "".join(f'<td class="number">{number}</td>' for number in numbers)
            + f'<td><span class="bar"><i style="width: {filled:.1%}"></i></span></td></tr>'
        )
    head = f"<th>{features}</th>" + "".join(f'<th class="number">{name}</th>' for name in names)
    head += f"<th>linear: chance, {chance:.2f} … perfect, 1.00</th>"
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def details(summary: str, text: str, opened: bool = False) -> str:
    """Plain text behind a heading that opens."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
