"""The whole of BEiT v2 in one command: images, tokenizer, pre-training, probe, report (`make demo`).

Interrupted and started again, it goes on where it was: every stage resumes from its own run folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from beitv2_fast.config.options import path
from beitv2_fast.distributed import run_main
from beitv2_fast.train.demo_images import write_demo_images
from beitv2_fast.training.monitor import stopping_signals

STAGES = "beitv2_fast.train"


def commands(root: Path, data: Path) -> list[tuple[str, list[str]]]:
    """(what it does, command) of every stage. Pre-training runs under the DeepSpeed launcher, on one process."""
    python = sys.executable
    deepspeed = [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    common = ["--preset", "demo", "--data", str(data)]
    tokenizer, pretrain, probe = root / "tokenizer", root / "pretrain", root / "probe"
    return [
        (
            "1/4  tokenizer: VQ-KD, from the teacher EfficientNet-Lite0",
            [python, "-m", f"{STAGES}.tokenizer", *common, "--out", str(tokenizer)],
        ),
        (
            "2/4  pre-training: masked image modeling with patch aggregation",
            [*deepspeed, "--module", f"{STAGES}.pretrain", *common, "--tokenizer", str(tokenizer),
             "--out", str(pretrain)],
        ),
        (
            "3/4  linear probe of the frozen backbone",
            [python, "-m", f"{STAGES}.linear_probe", *common, "--run", str(pretrain), "--tokenizer", str(tokenizer),
             "--out", str(probe)],
        ),
        (
            "4/4  report: curves, codes, pictures",
            [python, "-m", f"{STAGES}.report", *common, "--tokenizer", str(tokenizer), "--pretrain", str(pretrain),
             "--probe", str(probe), "--out", str(root / "report")],
        ),
    ]  # fmt: skip


def run_stage(command: list[str]) -> int:
    """Run a stage to its end; asked to stop, pass that on to all of its processes and wait until they have saved.

    A launcher may die of the signal at once, while the training that it started finishes its step: the whole process
    group has to be gone.
    """
    stage: subprocess.Popen | None = None
    asked: list[int] = []

    def pass_on() -> None:
        while stage is not None and asked:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(stage.pid, asked.pop())

    def received(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        pass_on()

    previous = {number: signal.signal(number, received) for number in stopping_signals()}
    try:
        stage = subprocess.Popen(command, start_new_session=True)
        pass_on()  # what came before there was a stage
        code = stage.wait()
        while _alive(stage.pid):
            time.sleep(0.1)
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def print_table(results: Path) -> None:
    table = json.loads(results.read_text())
    print(f"\n{table['metric']} of {table['task']}, {table['seeds']} seeds, chance {table['chance']:.2f}")
    for row in table["rows"]:
        print(f"  {row['features']:<44} {row['mean']:.3f} ± {row['std']:.3f}")
    for note in table["notes"]:
        print(f"  {note}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--data", type=path, help="your image folder (train/CLASS, test/CLASS) instead of solar cells")
    args = parser.parse_args()
    data = args.data or write_demo_images(args.out / "data")
    for title, command in commands(args.out, data):
        print(f"\n== {title}\n   {' '.join(command)}", flush=True)
        code = run_stage(command)
        if code:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return code
    print_table(args.out / "probe" / "results.json")
    print(f"\nreport: {(args.out / 'report' / 'report.html').resolve()}")
    print(f"logs, metrics and checkpoints: {args.out.resolve()}")
    return 0


if __name__ == "__main__":
    run_main(main)
