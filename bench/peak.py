"""The machine's peak rate of multiply-adds, measured: what no search can beat in that arithmetic."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.c")
STEPS = 5_000_000


def peak_rates() -> dict[str, float]:
    """Multiply-adds per second of one core, by arithmetic: "fp32" and, where there is an instruction, "bytes".

    Empty without a C compiler. The best of several short runs, in the thread's own processor time.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        command = [
            os.environ.get("CC", "cc"),
            "-O3",
            "-march=native",
            "-shared",
            "-fPIC",
            str(SOURCE),
            "-o",
            str(library),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        loaded = ctypes.CDLL(str(library))
    rates = {kind: max(_rate(getattr(loaded, kind)) for _ in range(7)) for kind in ("fp32", "bytes")}
    return {kind: rate for kind, rate in rates.items() if rate}


def _rate(loop: ctypes._CFuncPtr) -> float:
    loop.restype, loop.argtypes = ctypes.c_double, (ctypes.c_long, ctypes.POINTER(ctypes.c_float))
    sink = (ctypes.c_float * 2)(1.0, 1.0)
    started = time.thread_time()
    done = loop(STEPS, sink)
    return done / (time.thread_time() - started)


if __name__ == "__main__":
    for kind, rate in peak_rates().items():
        print(f"{kind}: {rate / 1e9:.0f} G multiply-adds per second on one core")
