"""The time of a call by four clocks, because on a GPU any single one misleads.

| clock | what it shows |
|---|---|
| gpu | between two events, the call queued behind a kernel that sleeps: the device's work with nothing to wait for |
| graph | replay of the call captured in a CUDA graph: the device's work without launches; None: it cannot be captured |
| host | until the call returns: Python, dispatcher and launches |
| wall | until its result is there |

A queue holds about a thousand launches: a call of more cannot be queued whole, nor one that waits for the device; its
gpu time is the sum of its kernels' times by the profiler. Inputs that fit in the L2 cache lie there, as in a training
the layer before leaves them. Without a GPU there is only the wall's clock.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import DEVICE, peak_memory

QUEUE = 800  # launches; the driver's queue holds 1024
LAUNCH = 4e-6  # seconds of host time for a launch, at least
CLOCK = 1.9e9  # Hz, of the kernel that sleeps; a slower card sleeps longer
LONGEST_SLEEP = 0.5  # seconds


@dataclass(frozen=True)
class Times:
    """Milliseconds per call; None where there is no such clock. peak: bytes above what was in use before."""

    gpu: float | None
    graph: float | None
    host: float
    wall: float
    peak: int | None
    gpu_clock: str | None = None  # "events" or "profiler"
    graph_error: str | None = None

    def numbers(self, flops: float = 0.0, moved: float = 0.0) -> dict[str, Any]:
        """As a result is written; with the rates that FLOPs and bytes of a call make of the device's time."""
        found: dict[str, Any] = {
            "gpu_ms": self.gpu, "graph_ms": self.graph, "host_ms": self.host, "wall_ms": self.wall,
            "peak_bytes": self.peak, "gpu_clock": self.gpu_clock, "graph_error": self.graph_error,
        }  # fmt: skip
        device = self.gpu or self.graph or self.wall
        if flops:
            found["tflops"] = flops / device / 1e9
        if moved:
            found["tbs"] = moved / device / 1e9
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def all_times(call: Callable[[], object], *, seconds: float = 1.0, graph: bool = True, on_device: bool = True) -> Times:
    """Time a call by every clock, for about ``seconds`` each; two calls of warm-up come first.

    on_device: whether it has work there; what runs on the CPU has only the clocks of the host.
    """
    for _ in range(2):
        call()
    wait()
    host, wall = host_and_wall(call, seconds)
    if DEVICE.type != "cuda" or not on_device:
        return Times(None, None, host, wall, None)
    (gpu, clock), peak = gpu_time(call, host), peak_memory(call)
    replay, error = None, None
    if graph:
        try:
            replay = graph_time(call, wall)
        except Exception as failure:
            replay, error = None, str(failure).strip().split("\n")[0][:160]
            _forget_capture()
    return Times(gpu, replay, host, wall, peak, clock, error)


def pipelined(call: Callable[[], object], seconds: float) -> float:
    """ms per call of several that are waited for together, as a training loop runs them."""
    count, started = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - started < seconds:
        call()
        count += 1
    wait()
    return 1e3 * (time.perf_counter() - started) / count


def host_and_wall(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Medians in ms of single calls that are waited for."""
    hosts, walls = [], []
    while len(walls) < 2 or (sum(walls) < seconds and len(walls) < 30):
        started = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - started)
        wait()
        walls.append(time.perf_counter() - started)
    return 1e3 * statistics.median(hosts), 1e3 * statistics.median(walls)


def gpu_time(call: Callable[[], object], host_ms: float) -> tuple[float, str]:
    """(ms, which clock): by events if several calls fit in the driver's queue, else the profiler's sum.

    Where the device went on before all were queued, because a call waits for it, events would count its idle time.
    """
    calls = int(min(QUEUE * LAUNCH / (host_ms / 1e3), 40))
    if calls < 3:
        return _busy(call), "profiler"
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda._sleep(int(min(1.5 * calls * host_ms / 1e3 + 1e-3, LONGEST_SLEEP) * CLOCK))
    for start, end in events:
        start.record()
        call()
        end.record()
    queued = not events[0][0].query()
    wait()
    if not queued:
        return _busy(call), "profiler"
    return statistics.median(start.elapsed_time(end) for start, end in events), "events"


def _busy(call: Callable[[], object]) -> float:
    return sum(milliseconds for milliseconds, _ in kernel_times(call).values())


def graph_time(call: Callable[[], object], wall_ms: float) -> float:
    """ms a replay. Raises whatever forbids a capture: a value that the host waits for, a generator's seed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    wait()
    replays = max(3, min(50, int(300 / max(wall_ms, 0.01))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    wait()
    return start.elapsed_time(end) / replays


def _forget_capture() -> None:
    """A capture that failed leaves its stream the current one and the random generator waiting for its end."""
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    with contextlib.suppress(AttributeError, RuntimeError):  # the section that follows gets a new process anyway
        fresh = torch.Generator(device="cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)


def kernel_times(call: Callable[[], object], calls: int = 2) -> dict[str, tuple[float, int]]:
    """(ms, launches) a call of every kernel by name, the longest first; of ops where there is no GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = DEVICE.type == "cuda"
    call()
    wait()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        for _ in range(calls):
            call()
        wait()
    found: dict[str, tuple[float, int]] = {}
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in profiler.events():
        if event.device_type != kind or getattr(event, "is_user_annotation", False):
            continue
        ms, count = found.get(event.name, (0.0, 0))
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        found[event.name] = ms + own / 1e3, count + 1
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return {name: (ms / calls, round(count / calls)) for name, (ms, count) in ordered}
