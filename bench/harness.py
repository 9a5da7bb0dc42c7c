"""What every benchmark shares: time and peak extra memory of each implementation of a group, one table a group.

A benchmark is one test an implementation::

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_search(benchmark, name):
        measure(benchmark, "search N=12544", name, run)     # the name OURS is what the others are divided by

At the end of the run ``bench/conftest.py`` prints the tables and writes ``<group>.json`` and ``.png`` to
``bench/results`` (of a GPU to ``bench/results/<device>``: the CPU's stay).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

OURS = "beitv2_fast"
RESULTS = Path(__file__).parent / "results"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Unavailable(Exception):
    """An implementation cannot run here; says why. Benchmarks turn it into a skip."""


@dataclass(frozen=True)
class Measurement:
    """One implementation of a group.

    Seconds of wall-clock time, and processor seconds of all threads (on a machine that others use too, the number to
    compare). others: how many processors were busy with other processes; they lengthen the wall-clock time, since work
    divided evenly among threads waits for the one whose processor is shared. peak_bytes above what was allocated before
    the call, result_bytes of these held by the results, which every implementation has to return.
    """

    name: str
    median: float
    best: float
    processor: float
    others: float | None
    rounds: int
    peak_bytes: int | None
    result_bytes: int

    @property
    def beyond_bytes(self) -> int | None:
        """Peak memory beyond the results."""
        return None if self.peak_bytes is None else max(self.peak_bytes - self.result_bytes, 0)


_groups: dict[str, list[Measurement]] = {}


def measure(
    benchmark: Any, group: str, name: str, run: Callable[[], object], *, seconds: float = 1.0
) -> dict[str, Measurement]:
    """Time ``run`` with pytest-benchmark for ``seconds`` (3 to 50 rounds, two to warm up), then its memory.

    Returns what was measured so far in the group, by name.
    """

    def synchronized() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    _give_back_from(32 << 20)
    held = result_bytes(run())  # and the warm-up
    started = time.perf_counter()
    synchronized()
    call = time.perf_counter() - started
    rounds = round(min(max(seconds / call, 3 if call > 1 else 5), 50))
    benchmark.group = group
    wall, started, busy = time.perf_counter(), time.process_time(), _busy_seconds()
    benchmark.pedantic(synchronized, rounds=rounds, iterations=1)
    wall, processor = time.perf_counter() - wall, time.process_time() - started
    others = None if busy is None else max((_busy_seconds() or busy) - busy - processor, 0) / wall
    processor /= rounds
    peak = peak_memory(run)
    benchmark.extra_info.update(peak_bytes=peak, result_bytes=held)
    stats = benchmark.stats.stats
    _groups.setdefault(group, []).append(
        Measurement(name, stats.median, stats.min, processor, others, rounds, peak, held)
    )
    return {m.name: m for m in _groups[group]}


def result_bytes(result: object) -> int:
    """Bytes of the storages behind the tensors of a result."""
    tensors = [result] if isinstance(result, torch.Tensor) else result if isinstance(result, (tuple, list)) else []
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure_in_turns(
    benchmark: Any, group: str, runs: dict[str, Callable[[], object]], *, rounds: int
) -> dict[str, Measurement]:
    """Time several implementations, one of them named ``OURS``, call by call in turn, then the memory of each.

    For calls of seconds, during which a shared machine changes. Returns what was measured, by name.
    """
    wall, processor, others = ({name: [] for name in runs} for _ in range(3))

    def timed(name: str) -> None:
        started, cpu, busy = time.perf_counter(), time.process_time(), _busy_seconds()
        runs[name]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        wall[name].append(time.perf_counter() - started)
        processor[name].append(time.process_time() - cpu)
        if busy is not None:
            others[name].append(max((_busy_seconds() or busy) - busy - processor[name][-1], 0) / wall[name][-1])

    def the_others() -> None:
        for name in runs:
            if name != OURS:
                timed(name)

    _give_back_from(32 << 20)
    benchmark.group = group
    benchmark.pedantic(timed, args=(OURS,), setup=the_others, rounds=rounds, warmup_rounds=0, iterations=1)
    for name, run in runs.items():
        times = (statistics.median(wall[name]), min(wall[name]), statistics.median(processor[name]))
        busy = statistics.mean(others[name]) if others[name] else None
        _groups.setdefault(group, []).append(Measurement(name, *times, busy, rounds, peak_memory(run), 0))
    return {m.name: m for m in _groups[group]}


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes of memory in use at the peak of one call, above those in use before it; None where nobody counts them.

    On the CPU the kernel counts (VmHWM of Linux), so that NumPy's and faiss's memory count as torch's does. It would
    count freed memory that malloc keeps, too, which depends on all that ran before: so the call runs in a thread of its
    own, whose part of the heap has no holes to fill, and freed blocks from 64 kB are given back at once.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    peaks: list[int] = []

    def counted() -> None:
        run()  # what libraries allocate once for a thread is no part of a call
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        before = _resident("VmHWM")
        run()
        peaks.append(max(_resident("VmHWM") - before, 0))

    _give_back_from(64 << 10)
    thread = threading.Thread(target=counted)
    thread.start()
    thread.join()
    _give_back_from(32 << 20)
    return peaks[0] if peaks else None


def _give_back_from(size: int) -> None:
    """Let malloc give freed blocks of at least ``size`` bytes back to the kernel, and keep smaller ones.

    Left alone, glibc raises that size with what a process happens to free, up to 32 MiB, where it mostly ends up
    among large tensors: fixed there, a time does not depend on which benchmarks ran before.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)
    except (OSError, AttributeError):
        return  # another C library


def _busy_seconds() -> float | None:
    """Seconds that all processors of the machine have worked for anybody; None where the kernel does not say."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks


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


def results_folder() -> Path:
    """Where results of this device lie; it is there afterwards."""
    device = re.sub(r"[^a-z0-9]+", "_", machine()["device"].lower()).strip("_")
    folder = RESULTS / device if DEVICE.type == "cuda" else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def report(write: Callable[[str], None]) -> None:
    """Print one table a group and write its JSON and plot; called once, at the end of the run."""
    for group, results in _groups.items():
        ours = next((r.median for r in results if r.name == OURS), None)
        write(f"\n{group} ({', '.join(f'{key} {value}' for key, value in machine().items())})")
        write(
            f"  {'implementation':<44}{'median ms':>11}{'best ms':>10}{'CPU ms':>10}{'others':>8}{'ratio':>8}"
            f"{'peak MB':>10}{'beyond results':>16}"
        )
        for r in sorted(results, key=lambda r: r.median):
            ratio = f"{r.median / ours:.1f}x" if ours else "-"
            others = "-" if r.others is None else f"{r.others:.1f}"
            memory, beyond = ("-" if n is None else f"{n / 1e6:.1f}" for n in (r.peak_bytes, r.beyond_bytes))
            times = "".join(f"{1e3 * t:>{w}.2f}" for t, w in ((r.median, 11), (r.best, 10), (r.processor, 10)))
            write(f"  {r.name:<44}{times}{others:>8}{ratio:>8}{memory:>10}{beyond:>16}")
        name = re.sub(r"[^a-z0-9]+", "_", group.lower()).strip("_")
        content = {"group": group, **machine(), "results": [asdict(r) for r in results]}
        folder = results_folder()
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _plot(group, results, folder / f"{name}.png")


def _plot(group: str, results: list[Measurement], path: Path) -> None:
    """Bars of median time and of peak memory beyond the results."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the table and the JSON say the same
    ordered = sorted(results, key=lambda r: -r.median)
    figure = Figure(figsize=(9, 1 + 0.4 * len(ordered)), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    names, colors = [r.name for r in ordered], ["tab:orange" if r.name == OURS else "tab:gray" for r in ordered]
    times, memory = [r.median * 1e3 for r in ordered], [(r.beyond_bytes or 0) / 1e6 for r in ordered]
    for axes, values, label in ((time_axes, times, "median ms"), (memory_axes, memory, "peak MB beyond the results")):
        axes.bar_label(axes.barh(names, values, color=colors), fmt="%.3g", padding=2)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    figure.suptitle(group)
    figure.savefig(path, dpi=120)
