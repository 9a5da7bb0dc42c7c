"""Sections tests and sanitizer: the GPU tests in several processes, and NVIDIA's checkers over every kernel once."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.gpu.run import ROOT, Run

PROCESSES = 12
SHARE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # of the cores, for each process
ONCE = "every_kernel_once"  # the tests that launch every kernel with small, odd sizes
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"  # where CUDA's toolkit puts it when it is not on the PATH
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error|xfailed|xpassed|deselected)")
FOUND = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-vv",
    "-p",
    "no:cacheprovider",
    "-m",
    "gpu",
)  # the log names what failed, whenever it ends


def tests(run: Run) -> None:
    limit = run.left() - 10  # what failed is told after an interrupt
    files = gpu_tests()[:1] if run.tiny else gpu_tests()
    command = [*PYTEST, "-rfE", "--continue-on-collection-errors", *files]
    if run.tiny:
        command += ["--collect-only"]  # whoever tests this runs the tests, too
    else:
        if _has("xdist"):
            command += ["-n", str(PROCESSES)]
        if _has("pytest_timeout"):
            command += ["--timeout=100", f"--session-timeout={max(limit - 15, 10):.0f}"]
    with run.item("pytest -m gpu"):
        done = run.command("pytest -m gpu", command, limit=limit, env={**SHARE, "COLUMNS": "300"})  # whole reasons
        if done is not None:
            run.say(
                "pytest -m gpu", code=done.returncode, seconds_of_tests=round(done.seconds, 1), **summary(done.stdout)
            )


def gpu_tests() -> list[str]:
    """The files of the tests marked ``gpu``: each process imports only these."""
    return [str(file.relative_to(ROOT)) for file in sorted(Path(ROOT, "tests").rglob("test_*_gpu.py"))]


def summary(output: str) -> dict[str, Any]:
    """What pytest's last line counts, and the tests that failed."""
    lines = [line for line in output.splitlines() if line.strip()]
    bad = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = lines[-1] if lines else ""
    return {"counts": {kind: int(n) for n, kind in SUMMARY.findall(last)}, "last": last[:200], "failed": bad[:40]}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def sanitizer(run: Run) -> None:
    tool = shutil.which("compute-sanitizer") or (SANITIZER if os.access(SANITIZER, os.X_OK) else None)
    files = [file for file in gpu_tests() if ONCE in Path(ROOT, file).read_text(encoding="utf-8")]
    reason = None if tool and run.on_gpu else "compute-sanitizer and a GPU are needed"
    reason = reason or (None if files else f"no test is named {ONCE}")
    for kind in ("memcheck", "racecheck"):
        if reason:
            run.say(kind, skipped=reason)
            continue
        with run.item(kind):
            limit = run.left() * (0.5 if kind == "memcheck" else 1.0)
            command = [tool, "--tool", kind, "--launch-timeout", "60", *PYTEST, "-k", ONCE, *files]
            # torch's allocator would hide accesses between its blocks
            done = run.command(kind, command, limit=limit, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            if done is not None:
                found = FOUND.findall(done.stdout)
                lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
                run.say(kind, code=done.returncode, found=int(found[-1]) if found else None, lines=lines[:20])
