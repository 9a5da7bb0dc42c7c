"""``python -m bench.gpu report FILE ...``: docs/gpu.md, its plots and its JSON from the results of a GPU.

Results of tiny sizes, as without a GPU, are never written there unless asked for, and say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.gpu import plots, tables
from bench.gpu.records import Records, read
from bench.gpu.run import ROOT

PAGE = ROOT / "docs" / "gpu.md"
WARNING = (
    "> **NOT A MEASUREMENT.** These results come from tiny sizes{}: they show that the program runs, and nothing about "
    "the speed of anything. Do not quote a number of this page.\n"
)
LEGEND = (
    "GPU: device time of a call queued behind other work (* the sum of its kernels, where a call has more launches "
    "than the queue holds, or waits for the device); graph: replay of a captured CUDA graph (no: it cannot be "
    "captured); host: until the call returns; wall: until its result is there; ratio: device time to ours, of vectors "
    "to that on Gaussian ones; peak: memory above what was in use."
)
Part = Callable[[Records], Iterator[str]]
PARTS: tuple[tuple[str, Part], ...] = (
    ("Goals", tables.goal_rows),
    ("What the card reaches", tables.ceilings),
    ("Correctness", tables.correctness),
    *((title, lambda records, s=section: tables.timed(records, s)) for section, title in tables.TIMED.items()),
    ("Whole steps", tables.steps),
    ("Where a step's time goes", tables.profile),
    ("Kernels of a call", tables.kernels),
    ("Trainings from files", tables.trainings),
    ("Does it learn", tables.learning),
    ("Left out, and failed", tables.left_out),
)


def is_measurement(records: Records) -> bool:
    return records.machine["kind"] == "cuda" and not records.machine["tiny"]


def page(records: Records, pictures: dict[str, Path], folder: Path, note: str | None = None) -> str:
    lines = [f"# Measured on {records.machine['device']}\n"]
    if not is_measurement(records):
        lines.append(WARNING.format("" if records.machine["kind"] == "cuda" else " on a CPU"))
    lines += [*([f"{note}\n"] if note else []), *tables.machine(records), "", LEGEND, ""]
    lines += [f"![{title}]({file.relative_to(folder).as_posix()})\n" for title, file in pictures.items()]
    for title, part in PARTS:
        body = list(part(records))
        if body:
            lines += [f"\n## {title}\n", *body]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="results: OUT/*.jsonl")
    parser.add_argument(
        "--out", type=Path, help="the page; by default docs/gpu.md, of tiny results gpu.md beside the first file"
    )
    parser.add_argument("--note", help="a paragraph that the page begins with")
    options = parser.parse_args(argv)
    try:
        records = read(options.files)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    out = options.out or (PAGE if is_measurement(records) else options.files[0].parent / PAGE.name)
    beside = out.with_suffix("")
    beside.mkdir(parents=True, exist_ok=True)
    pictures = plots.write(records, beside)
    out.write_text(page(records, pictures, out.parent, options.note), encoding="utf-8")
    kept = [
        records.machine,
        *({"section": "run", "what": "plan", "command": c} for c in records.commands),
        *records.all,
    ]
    (beside / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    print(out)
    return 0
