"""What every benchmark shares: time and peak extra memory of each implementation of a group, one table a group.

A benchmark is one test an implementation::

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_search(benchmark, name):
        measure(benchmark, "search N=12544", name, run)     # the name OURS is what the others are divided by

At the end of the run ``bench/conftest.py`` prints the tables and writes ``bench/results/<group>.json`` and ``.png``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

OURS = "beitv2_fast"
RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Unavailable(Exception):
    """An implementation cannot run here; says why. Benchmarks turn it into a skip."""


@dataclass(frozen=True)
class Measurement:
    """One implementation of a group: seconds of wall-clock time, processor seconds of all threads (on a machine that
    others use too, the number to compare), bytes above what was allocated before the call."""

    name: str
    median: float
    best: float
    processor: float
    rounds: int
    peak_bytes: int | None


_groups: dict[str, list[Measurement]] = {}


def measure(benchmark: Any, group: str, name: str, run: Callable[[], object], *, seconds: float = 2.0) -> None:
    """Time ``run`` with pytest-benchmark for ``seconds`` (5 to 50 rounds, two to warm up), then its memory."""

    def synchronised() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    synchronised()
    synchronised()
    rounds = round(min(max(2 * seconds / (time.perf_counter() - started), 5), 50))
    benchmark.group = group
    started = time.process_time()
    benchmark.pedantic(synchronised, rounds=rounds, iterations=1)
    processor = (time.process_time() - started) / rounds
    peak = peak_memory(run)
    benchmark.extra_info["peak_bytes"] = peak
    stats = benchmark.stats.stats
    _groups.setdefault(group, []).append(Measurement(name, stats.median, stats.min, processor, rounds, peak))


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes of memory in use at the peak of one call, above those in use before it; None where nobody counts them.

    On the CPU the kernel counts (VmHWM of Linux), so that NumPy's and faiss's memory count as torch's does, to within
    about half a megabyte. What earlier calls freed is given back first, or it would be used again unseen.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        before = _resident("VmHWM")
    except (OSError, AttributeError):
        return None
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if line is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(line[1]) * 1024


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(write: Callable[[str], None]) -> None:
    """Print one table a group and write its JSON and plot; called once, at the end of the run."""
    for group, results in _groups.items():
        ours = next((r.median for r in results if r.name == OURS), None)
        write(f"\n{group} ({', '.join(f'{key} {value}' for key, value in machine().items())})")
        write(f"  {'implementation':<44}{'median ms':>11}{'best ms':>10}{'CPU ms':>10}{'ratio':>8}{'peak MB':>10}")
        for r in sorted(results, key=lambda r: r.median):
            ratio = f"{r.median / ours:.1f}x" if ours else "-"
            memory = "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.1f}"
            times = "".join(f"{1e3 * t:>{w}.2f}" for t, w in ((r.median, 11), (r.best, 10), (r.processor, 10)))
            write(f"  {r.name:<44}{times}{ratio:>8}{memory:>10}")
        name = re.sub(r"[^a-z0-9]+", "_", group.lower()).strip("_")
        RESULTS.mkdir(exist_ok=True)
        content = {"group": group, **machine(), "results": [asdict(r) for r in results]}
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _plot(group, results, RESULTS / f"{name}.png")


def _plot(group: str, results: list[Measurement], path: Path) -> None:
    """Bars of median time and of peak memory."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the table and the JSON say the same
    ordered = sorted(results, key=lambda r: -r.median)
    figure = Figure(figsize=(9, 1 + 0.4 * len(ordered)), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    names, colors = [r.name for r in ordered], ["tab:orange" if r.name == OURS else "tab:gray" for r in ordered]
    times, memory = [r.median * 1e3 for r in ordered], [(r.peak_bytes or 0) / 1e6 for r in ordered]
    for axes, values, label in ((time_axes, times, "median ms"), (memory_axes, memory, "peak extra MB")):
        axes.bar_label(axes.barh(names, values, color=colors), fmt="%.3g", padding=2)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    figure.suptitle(group)
    figure.savefig(path, dpi=120)
