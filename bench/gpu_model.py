"""``python -m bench.gpu_model``: what the GPU kernels should cost, from their machine code. A model, not a measurement.

Every kernel is compiled for a target that is not here (bench.aot), the hot loop of its disassembly is counted by
pipe, and the launch is priced as the slowest of: each pipe at its peak rate, instruction issue, tensor-core FLOPs,
bytes through L2, bytes from memory. Latency, bank conflicts, clock throttling and what does not overlap are left out,
so real times are longer; the model says what bounds a kernel and compares kernels on equal terms.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.aot import TARGETS, Binary, Instruction
from bench.gpu_kernels import CASES, Case
from bench.gpu_peers import cut_cross_entropy_cases, flash_kmeans_cases


@dataclass(frozen=True)
class Gpu:
    """Peak rates. Lanes and FLOPs are per clock and multiprocessor; bandwidths in bytes per second."""

    name: str
    processors: int
    clock: float  # Hz
    tensor: float  # dense fp16 FLOPs
    lanes: dict[str, float]
    l2: float
    memory: float


# From the vendors' white papers and instruction throughput tables (CUDA programming guide; CDNA3 white paper). The L2
# rates are not all published: 5,120 bytes per clock for A100, assumed for H100, twice that for B200.
_NVIDIA = {"alu": 64, "memory": 32, "special": 16, "fp64": 64, "issue": 128}
GPUS = {
    "sm_80": Gpu("A100 SXM", 108, 1.41e9, 2048, {**_NVIDIA, "fma": 64, "fp64": 32}, 5120 * 1.41e9, 2.04e12),
    "sm_90": Gpu("H100 SXM", 132, 1.755e9, 4096, {**_NVIDIA, "fma": 128}, 5120 * 1.755e9, 3.35e12),
    "sm_100": Gpu("B200", 148, 1.85e9, 8192, {**_NVIDIA, "fma": 128}, 10240 * 1.85e9, 8e12),
    "gfx942": Gpu(
        "MI300X", 304, 2.1e9, 2048, {"alu": 64, "memory": 64, "special": 16, "fp64": 64, "issue": 256}, 17e12, 5.3e12
    ),
}
PIPES = ("tensor", "fma", "alu", "fp64", "special", "memory", "uniform", "other")
_NVIDIA_PIPES = (
    ("tensor", r"[HIDBQ]G?MMA|UTC\w*MMA"),
    ("fma", r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("special", r"MUFU|I2F|F2I|F2F|I2I|FRND"),
    ("memory", r"LD|ST|ATOM|RED|SHFL|UTMA|UBLK|SYNCS|MATCH|CCTL"),
    ("uniform", r"U[A-Z]|R2UR|S2UR|VOTE"),
    (
        "other",
        r"BRA|BAR|NOP|DEPBAR|WARP|FENCE|MEMBAR|ELECT|EXIT|BSSY|BSYNC|CALL|RET|ERRBAR|B2R|S2R|CS2R|NANOSLEEP|YIELD",
    ),
)
_AMD_PIPES = (
    ("tensor", r"v_s?mfma"),
    ("fp64", r"v_\w+_f64"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)"),
    ("memory", r"ds_|global_|buffer_|flat_|scratch_"),
    ("other", r"s_(waitcnt|barrier|nop|cbranch|branch|endpgm|sleep|setprio)"),
    ("uniform", r"s_"),
)  # every other v_ instruction shares one vector ALU


def pipe(instruction: Instruction, backend: str) -> str:
    for name, pattern in _AMD_PIPES if backend == "hip" else _NVIDIA_PIPES:
        if re.match(pattern, instruction.opcode):
            return name
    return "alu"


@dataclass(frozen=True)
class Estimate:
    """One launch: warp instructions of the hot loop by pipe, seconds by what could bound it."""

    case: Case
    binary: Binary
    pipes: Counter[str]
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.get)

    @property
    def alu_per_unit(self) -> float:
        """Lane instructions of the ALU pipe for each score (or element)."""
        lanes = self.case.num_warps * self.binary.target.warp
        return self.pipes["alu"] * lanes / self.case.units


def count(case: Case, binary: Binary) -> Counter[str]:
    """Warp instructions by pipe of one iteration of the hot loop, with its share of what the loop around it does."""
    backend, loops = binary.target.backend, binary.loops()
    if case.steps <= 1:
        return Counter(pipe(i, backend) for i in binary.instructions)  # paths not taken included
    if not binary.tensor_instructions:
        return Counter(pipe(i, backend) for body in loops for i in body)
    inner = binary.hot_loop()
    pipes = Counter(pipe(i, backend) for i in inner)
    around = [body for body in loops if len(body) > len(inner)]
    if case.outer_steps:
        outer = Counter(pipe(i, backend) for i in (around[-1] if around else binary.instructions))
        for name in outer:
            pipes[name] += (outer[name] - pipes[name]) * case.outer_steps / case.steps
    return pipes


def estimate(case: Case, target: str) -> Estimate:
    binary, gpu = case.compile(target), GPUS[target]
    pipes = count(case, binary)
    # Programs are dealt out evenly; the last round of an uneven deal leaves multiprocessors idle.
    rounds = math.ceil(case.programs / gpu.processors)
    lane_instructions = rounds * max(case.steps, 1) * case.num_warps * binary.target.warp
    seconds = {
        name: lane_instructions * pipes[name] / rate / gpu.clock for name, rate in gpu.lanes.items() if pipes[name]
    }
    seconds["issue"] = lane_instructions * pipes.total() / gpu.lanes["issue"] / gpu.clock
    if pipes["tensor"]:
        idle = rounds * gpu.processors / case.programs
        seconds["tensor"] = idle * case.flops / (gpu.tensor * gpu.processors * gpu.clock)
    seconds["L2"] = case.l2 / gpu.l2
    seconds["DRAM"] = (case.read + case.written) / gpu.memory
    return Estimate(case, binary, pipes, seconds)


COLUMNS = ("kernel", "MB", "GFLOP", *PIPES, "ALU a unit", "regs", "blocks/SM", "us", "bound by")


def row(e: Estimate) -> tuple[str, ...]:
    c = e.case
    return (
        f"{c.op}: {c.name}",
        f"{(c.read + c.written) / 1e6:.1f}",
        f"{c.flops / 1e9:.2f}",
        *(f"{e.pipes[name]:.0f}" if e.pipes[name] else "" for name in PIPES),
        f"{e.alu_per_unit:.2f}",
        f"{e.binary.registers}{'!' if not e.binary.fits else ''}",
        str(e.binary.blocks_per_sm),
        f"{1e6 * e.seconds[e.bound]:.1f}",
        e.bound,
    )


def cases(target: str, peers: bool) -> Iterator[Case | str]:
    """All kernels for a target; a string is the reason why some are left out."""
    for generate in CASES:
        try:
            yield from generate(target, processors=GPUS[target].processors)
        except ImportError as error:
            yield f"{generate.__name__} is left out: {error}"
    if not peers:
        return
    generators: tuple[tuple[str, Callable[[], Iterator[Case]]], ...] = (
        ("flash-kmeans", flash_kmeans_cases),
        ("flash-kmeans", lambda: flash_kmeans_cases(dtype="fp32")),
        ("cut-cross-entropy", cut_cross_entropy_cases),
    )
    for package, generate in generators:
        try:
            yield from generate()
        except ImportError as error:
            yield f"{package} is left out: {error}"


def table(target: str, peers: bool = True) -> str:
    gpu = GPUS[target]
    lines = [f"**{target}, {gpu.name}** (model, not measured)", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    reasons = []
    for case in cases(target, peers):
        if isinstance(case, str):
            reasons.append(case)
            continue
        try:
            lines.append("| " + " | ".join(row(estimate(case, target))) + " |")
        except Exception as error:  # a peer's kernel may not compile for a target it was not written for
            reasons.append(f"{case.op}: {case.name} does not compile for {target}: {str(error).splitlines()[0][:160]}")
    return "\n".join([*lines, *(f"\n{reason}" for reason in reasons)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only this target (may be repeated)")
    parser.add_argument("--no-peers", action="store_true", help="leave out the kernels of other packages")
    arguments = parser.parse_args()
    print("A model from machine code and peak rates; nothing here was run. Hot loop: warp instructions by pipe.\n")
    for target in arguments.target or TARGETS:
        print(table(target, peers=not arguments.no_peers), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
