"""A training that runs for long: are memory, open files and step time flat? `python -m bench.soak --minutes 30`.

A small tokenizer training (with checkpoints, pictures, two data workers, k-means, restarts of codes) on drawn images,
in a process of its own that is looked at every few seconds through /proc: resident memory and open files of it and its
workers, and its processor time per step, which other users of the machine disturb less than wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = (
    "--preset demo --image-size 64 --patch-size 8 --dim 48 --depth 2 --heads 2 --teacher-image-size 128 "
    "--num-codes 256 --code-dim 8 --decoder-depth 1 --batch-size 8 --epochs 1000000 --views 0 --no-in-memory "
    "--workers 2 --device cpu --precision fp32 --log-every 10 --save-every 100 --lr 1e-4 --warmup-epochs 1"
).split()
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    seconds: float
    step: int
    resident_mb: float
    open_files: int
    cpu_seconds: float


@dataclass(frozen=True)
class Soak:
    """Growth of the medians from the second quarter of the time to the last one; the first is the start."""

    minutes: float
    steps: int
    resident_mb: float
    resident_growth: float
    open_files: int
    open_files_growth: int
    cpu_ms_a_step: float
    cpu_growth: float


def write_images(folder: Path, count: int = 64) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        Image.effect_noise((160, 140), 20 + i).convert("RGB").save(folder / f"{i:03d}.jpg")
    return folder


def look(pid: int, started: float, metrics: Path) -> Sample:
    processes = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    resident = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) * PAGE for p in processes)
    files = sum(len(os.listdir(f"/proc/{p}/fd")) for p in processes)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    step = json.loads(lines[-1])["step"] if lines else 0
    return Sample(time.monotonic() - started, step, resident / 1e6, files, sum(map(int, fields[11:13])) / TICKS)


def watch(folder: Path, minutes: float, every: float = 5.0) -> list[Sample]:
    """Train for so long, then stop by SIGTERM."""
    command = [sys.executable, str(ROOT / "train" / "tokenizer.py"), *OPTIONS]
    command += ["--data", str(write_images(folder / "images")), "--out", str(folder / "run")]
    started, samples = time.monotonic(), []
    with (folder / "output.txt").open("w") as output:
        training = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while time.monotonic() < started + 60 * minutes and training.poll() is None:
                time.sleep(every)
                samples.append(look(training.pid, started, folder / "run" / "metrics.jsonl"))
        finally:
            training.send_signal(signal.SIGTERM)
            code = training.wait()
    if code != 128 + signal.SIGTERM:
        raise RuntimeError(f"the training ended with code {code}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return samples


def summary(samples: list[Sample]) -> Soak:
    n = len(samples) // 4
    early, late = samples[n : 2 * n + 1], samples[-n - 1 :]

    def growth(name: str) -> float:
        first, last = (median(getattr(s, name) for s in part) for part in (early, late))
        return last / first - 1

    def cpu(part: list[Sample]) -> float:
        return (part[-1].cpu_seconds - part[0].cpu_seconds) / (part[-1].step - part[0].step)

    files = [median(s.open_files for s in part) for part in (early, late)]
    return Soak(
        samples[-1].seconds / 60, samples[-1].step, median(s.resident_mb for s in late), growth("resident_mb"),
        int(files[1]), int(files[1] - files[0]), 1e3 * cpu(late), cpu(late) / cpu(early) - 1,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long [30]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asdict(summary(watch(Path(folder), arguments.minutes))), indent=2))


if __name__ == "__main__":
    main()
