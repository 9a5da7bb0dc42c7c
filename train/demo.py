"""The whole of BEiT v2 in one command: images, tokenizer, pre-training, probe, report (`make demo`).

Interrupted and started again, it goes on where it was: every stage resumes from its own run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from beitv2_fast.config.options import VERSION, Parser, path
from beitv2_fast.data.find import find_images
from beitv2_fast.distributed import run_main
from beitv2_fast.show.report.page import probe_cells, sampling_error
from beitv2_fast.train.demo_images import split_images, write_demo_images
from beitv2_fast.training.monitor import stopping_signals

STAGES = "beitv2_fast.train"
USER_ERROR = 2  # the exit code of a mistake that the stage has explained
MEANING = (
    "Each row: a linear classifier, and the nearest training photographs, tell the classes of photographs that no "
    "training has seen by frozen features. What the pre-training was worth is what its rows have above the untrained "
    "network's, where that is more than the deviation (±) over the seeds and the standard error."
)


def commands(root: Path, data: Path, *, labeled: bool, seed: int = 0) -> list[tuple[str, list[str]]]:
    """(what it does, command) of every stage, the probe only of labeled images. Pre-training runs under the DeepSpeed
    launcher, on one process.
    """
    python = sys.executable
    with socket.create_server(("127.0.0.1", 0)) as free:  # the launcher's own port serves one training per machine
        port = str(free.getsockname()[1])
    deepspeed = [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    deepspeed += ["--log_level", "critical"]
    preset = ["--preset", "demo"]
    common = [*preset, "--seed", str(seed), "--data", str(data)]
    tokenizer, pretrain, probe = (root / name for name in ("tokenizer", "pretrain", "probe"))
    stages = [
        (
            "tokenizer: VQ-KD, from the teacher EfficientNet-Lite0",
            [python, "-m", f"{STAGES}.tokenizer", *common, "--out", str(tokenizer)],
        ),
        (
            "pre-training: masked image modeling with patch aggregation",
            [*deepspeed, "--module", f"{STAGES}.pretrain", *common, "--tokenizer", str(tokenizer),
             "--out", str(pretrain)],
        ),
        (
            "linear probe of the frozen backbone",
            [python, "-m", f"{STAGES}.linear_probe", *common, "--run", str(pretrain), "--tokenizer", str(tokenizer),
             "--out", str(probe)],
        ),
        (
            "report: curves, codes, pictures",
            [python, "-m", f"{STAGES}.report", *preset, "--data", str(data), "--tokenizer", str(tokenizer),
             "--pretrain", str(pretrain), "--probe", str(probe), "--out", str(root / "report")],
        ),
    ]  # fmt: skip
    return stages if labeled else [*stages[:2], stages[3]]


def environment() -> dict[str, str]:
    """Of the stages. OpenMP's threads sleep while they wait: spinning, they would take the processors from one another
    wherever other programs keep these busy. DeepSpeed is told what it would find, with a warning for each process.
    """
    return {"OMP_WAIT_POLICY": "passive", **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
            **os.environ}  # fmt: skip


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
        stage = subprocess.Popen(command, start_new_session=True, env=environment())
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
    print(f"\n{table['metric']}, {table['task']}; {table['seeds']} seeds, chance {table['chance']:.2f}")
    for features, *numbers in probe_cells(table):
        print(f"  {features:<48}", *(f"{number:<14}" for number in numbers))
    for note in [*sampling_error(table), *table["notes"]]:
        print(f"  {note}")


def next_commands(root: Path, data: Path, *, classes: bool) -> list[str]:
    """What to do with the runs, as it is typed."""
    executable = Path(sys.executable)
    python = executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable
    explore = ["beitv2_fast", "explore", root]
    encode = ["beitv2_fast", "encode", data, "--tokenizer", root / "tokenizer", "--out", root / "codes.npz"]
    finetune = [f"{STAGES}.finetune", "--preset", "demo", "--data", data, "--weights", root / "pretrain"]
    found = [explore, encode, [*finetune, "--out", root / "finetune"]][: 3 if classes else 2]
    return [shlex.join([str(python), "-m", *map(str, words)]) for words in found]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument(
        "--data", type=path, help="your images instead of solar cells: train/CLASS/* and test/CLASS/*; or CLASS/*, or "
        "images without classes, of which a quarter is held out"
    )  # fmt: skip
    parser.add_argument("--out", type=path, help="folder of the runs [runs/demo; with --data runs/NAME]")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings and the probe [0]; give another --out")
    args = parser.parse_args()
    root = args.out or Path("runs", args.data.resolve().name if args.data else "demo")
    data = split_images(args.data, root / "data") if args.data else write_demo_images(root / "data")
    if data == root / "data" and args.data:
        print(f"{find_images(args.data).summary}; a quarter is held out, in {data}/test")
    labeled = len(find_images(data, "train").classes) > 1
    if not labeled:
        print(f"{data} has no two class folders, so there is nothing to probe: tokenizer, pre-training and report")
    stages = commands(root, data, labeled=labeled, seed=args.seed)
    for number, (title, command) in enumerate(stages, 1):
        print(f"\n== {number}/{len(stages)}  {title}\n   {shlex.join(command)}", flush=True)
        code = run_stage(command)
        if code:
            if code != USER_ERROR:
                print("stopped; the same command goes on from here", file=sys.stderr)
            return code if code > 0 else 128 - code  # as shells tell a signal, of which a launcher dies
    if labeled:
        print_table(root / "probe" / "results.json")
        print(f"\n{MEANING}")
    print(f"\nreport: {(root / 'report' / 'report.html').resolve()}")
    print(f"logs, metrics and checkpoints: {root.resolve()}")
    print("next:", *next_commands(root, data, classes=labeled), sep="\n  ")
    return 0


if __name__ == "__main__":
    run_main(main)
