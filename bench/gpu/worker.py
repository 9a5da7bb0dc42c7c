"""The process in which sections run: reads their names from stdin, writes their results to stdout (see ``runner``)."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.gpu.plan import BY_NAME
from bench.gpu.run import LostContext, Run


def machine(tiny: bool) -> dict[str, Any]:
    """What the numbers were measured on, with what."""
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = None
    about = {**harness.machine(), "triton": compiler, "python": sys.version.split()[0], "tiny": tiny}
    if harness.DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "driver": _driver(), "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        }  # fmt: skip
    return {**about, "kind": harness.DEVICE.type}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return None


def run_section(name: str, seconds: float, tiny: bool, data: Path | None) -> bool:
    """Run one, whatever it raises; whether this process is still good for another."""
    run = Run(name, tiny, time.monotonic() + seconds, data)
    failed: dict[str, Any] = {}
    torch.manual_seed(0)
    try:
        BY_NAME[name].load()(run)
    except LostContext as error:
        failed = {"error": f"the GPU was lost: {error}"[:400]}
        run.tainted = True
    except Exception:
        failed = {"error": traceback.format_exc()[-1500:]}
    run.say("section", seconds=round(time.monotonic() - run.started, 1), **failed, replace=run.tainted)
    return not run.tainted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    tiny = arguments.tiny or harness.DEVICE.type == "cpu"
    if tiny and harness.DEVICE.type == "cpu":
        torch.set_num_threads(1)  # at such sizes threads only wait for one another
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands that a section starts
    Run("run", tiny, time.monotonic()).say("machine", **machine(tiny))
    gc.freeze()  # each measurement of memory collects first: what was imported need not be looked at again
    for line in sys.stdin:
        asked = json.loads(line)
        if not run_section(asked["section"], asked["seconds"], tiny, arguments.data):
            break
    sys.stdout.flush()
    os._exit(0)  # libraries' threads have nothing left to say


if __name__ == "__main__":
    main()
