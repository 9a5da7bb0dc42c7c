"""Launches of Triton kernels for a GPU that is not here: everything but the run itself.

Under ``launching(target)`` Triton has a driver with a target and without a device. Host code that is called with CPU
tensors goes the whole way of a launch: arguments are specialized as the JIT does it (None and integers equal to 1 are
constants, multiples of 16 are marked, addresses too), kernels are compiled and held against the target's shared memory,
an autotuner tries every configuration. In place of the start on a device the launch is noted; no output changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from bench.aot import TARGETS, Binary, read_binary, read_resources

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
FIRST_DEVICE = 1000  # the JIT keeps compiled kernels by device: these numbers are no GPU's


@dataclass(frozen=True)
class Launch:
    """One launch. ``registers`` and ``stack`` (in bytes, where registers are spilled to) are those of a lane; ``read``:
    what the kernel is made of, which takes a disassembler."""

    kernel: str
    num_warps: int
    grid: tuple[int, int, int]
    registers: int
    stack: int
    read: Callable[[], Binary]

    @property
    def fits(self) -> bool:
        return self.stack == 0 and all(1 <= size <= most for size, most in zip(self.grid, MAX_GRID, strict=True))


class NoDevice:
    """What Triton asks of its driver in a launch."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        target = TARGETS[name]
        self.target = GPUTarget(target.backend, target.arch, target.warp)
        self.number = FIRST_DEVICE + list(TARGETS).index(name)
        self.properties = {"max_shared_mem": target.shared_block}
        self.utils = self
        self.grid = (0, 0, 0)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, MAX_THREADS

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.grid = arguments[:3]

        return launch

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def time_nothing(launch: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
            launch()
            return [0.0 for _ in quantiles]

        return time_nothing


_driver = cache(NoDevice)  # compiled kernels outlive a test, and with them the launchers they were given


@contextmanager
def launching(target: str) -> Iterator[list[Launch]]:
    """The launches made inside, in order; ``target``: a key of ``bench.aot.TARGETS``.

    A kernel that asks for more than the target has is an error, which an autotuner would leave out without a word.
    """
    from triton.errors import TritonError
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from beitv2_fast.kernels.codebook_update import triton as update  # which looks at torch for the kind of GPU

    device, launches, run = _driver(target), [], JITFunction.run
    resources = cache(lambda hash: read_resources(kernels[hash].asm))
    kernels: dict[str, Any] = {}

    def run_and_note(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        try:
            kernel = run(self, *arguments, **options)
        except TritonError as error:
            raise AssertionError(f"{self.__name__} for {target}: {error}") from error
        kernels[kernel.hash] = kernel
        read = partial(read_binary, kernel, TARGETS[target])
        launches.append(Launch(self.__name__, kernel.metadata.num_warps, device.grid, *resources(kernel.hash), read))
        return kernel

    warps = patch.object(update, "NUM_WARPS", 2 if target == "gfx942" else 4)
    with patch.object(driver, "_active", device), patch.object(JITFunction, "run", run_and_note), warps:
        yield launches


def binaries(target: str, *calls: Callable[[], object]) -> dict[str, Binary]:
    """What the calls' kernels are made of, by name; of those launched several times the last."""
    with launching(target) as launches:
        for call in calls:
            call()
    return {launch.kernel: launch.read() for launch in launches}
