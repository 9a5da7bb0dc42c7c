"""``python -m bench.gpu SECTION ... | --all``, and ``python -m bench.gpu report FILE ...``.

Results are appended to OUT/results.jsonl, one JSON object a line, and what else was printed to OUT/results.log; of
programs that run side by side, too. Without a GPU all sizes are tiny: that tests this program, and measures nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from bench.gpu.plan import BY_NAME, SECTIONS, chosen
from bench.gpu.runner import Results, run_sections


def arguments_of(argv: list[str]) -> argparse.Namespace:
    sections = "\n".join(f"  {s.name:<11}{s.what}" for s in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=f"{__doc__}\nSections:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="sections, in the order in which they run")
    parser.add_argument("--all", action="store_true", help="all sections")
    parser.add_argument("--minutes", type=float, default=60.0, help="of all: the last sections are cut or left out")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small sizes also where there is a GPU")
    parser.add_argument("--data", type=Path, help="photographs for section learn: a folder or a packed file")
    options = parser.parse_args(argv)
    if not (options.sections or options.all):
        parser.error("name sections or --all; --help lists them")
    return options


def main(argv: list[str]) -> int:
    if argv[:1] == ["report"]:
        from bench.gpu.report import main as report

        return report(argv[1:])
    options = arguments_of(argv)
    try:
        sections = chosen(list(BY_NAME) if options.all else options.sections)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what runs, rather than leave it
    options.out.mkdir(parents=True, exist_ok=True)
    shown = [Path(each).name if Path(each).is_absolute() else each for each in argv]  # a report names no one's folders
    about = {"command": f"python -m bench.gpu {' '.join(shown)}"}
    with (options.out / "results.log").open("a", encoding="utf-8") as log:
        results = Results(options.out / "results.jsonl", about)
        data = options.data and options.data.resolve()
        lost = run_sections(sections, results, log, minutes=options.minutes, tiny=options.tiny, data=data)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
