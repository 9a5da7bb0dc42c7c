"""The report: ``python train/report.py --tokenizer RUN --pretrain RUN --probe RUN --data FOLDER --out FOLDER``.

Writes report.html, self-contained, and its pictures as PNG files next to it. Runs that are missing or unfinished are
said to be.
"""

from __future__ import annotations

import logging

from beitv2_fast.config.options import parse
from beitv2_fast.config.presets import REPORT
from beitv2_fast.config.show import ReportConfig
from beitv2_fast.distributed import run_main, start
from beitv2_fast.show.report import build_report


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, _ = parse(ReportConfig, REPORT, argv)
    page = build_report(config, start(config.device).device)
    print(f"report: {page.resolve()}")
    return 0


if __name__ == "__main__":
    run_main(main)
