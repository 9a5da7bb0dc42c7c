"""``python -m bench.gpu SECTION ... | --part A | --all``, and ``python -m bench.gpu report FILE ...``.

Results go to OUT/NAME.jsonl, one JSON object a line, and what else was printed to OUT/NAME.log; NAME is the part's
letter, "all" or "sections". Without a GPU all sizes are tiny: that tests this program, and measures nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from bench.gpu.plan import PART_MINUTES, SECTIONS, chosen
from bench.gpu.runner import Results, run_sections


def arguments_of(argv: list[str]) -> argparse.Namespace:
    sections = "\n".join(f"  {s.part}  {s.name:<11}{s.what}" for s in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=f"{__doc__}\nParts and sections:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="sections by name")
    parser.add_argument("--part", choices=PART_MINUTES, help="the sections of a part")
    parser.add_argument("--all", action="store_true", help="all sections")
    parser.add_argument(
        "--minutes", type=float,
        help=f"leave out what does not fit, the least important first; of one part only {PART_MINUTES}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small sizes also where there is a GPU")
    parser.add_argument("--data", type=Path, help="photographs to learn from (part C): a folder or a packed file")
    options = parser.parse_args(argv)
    if not (options.sections or options.part or options.all):
        parser.error("name sections, a --part, or --all; --help lists them")
    return options


def main(argv: list[str]) -> int:
    if argv[:1] == ["report"]:
        from bench.gpu.report import main as report

        return report(argv[1:])
    options = arguments_of(argv)
    try:
        sections = chosen(options.sections, options.part, options.all)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    name = "all" if options.all else options.part if not options.sections else "sections"
    minutes = options.minutes or PART_MINUTES.get(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what runs, rather than leave it
    options.out.mkdir(parents=True, exist_ok=True)
    shown = [Path(each).name if Path(each).is_absolute() else each for each in argv]  # a report names no one's folders
    about = {"command": f"python -m bench.gpu {' '.join(shown)}"}
    with (options.out / f"{name}.log").open("a", encoding="utf-8") as log:
        results = Results(options.out / f"{name}.jsonl", about)
        lost = run_sections(
            sections, results, log, minutes=minutes, tiny=options.tiny, data=options.data and options.data.resolve()
        )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
