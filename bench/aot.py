"""Compile Triton kernels for GPUs that are not here and read what the hardware would run.

``compile_kernel`` needs no GPU and no driver: Triton emits the binary, and the tools inside its own wheel (cuobjdump,
nvdisasm) or the assembly text (AMD) say what is in it: registers, spills, shared memory, tensor-core instructions,
16-byte loads and, with the limits of the target, how many blocks a multiprocessor holds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

SHARED_RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself in every block
LEAST_SHARED = 99 * 1024  # bytes per block on 8.6, 8.9 and 12.x, which get what is chosen for sm_80
LDS_GRANULE, SHARED_GRANULE, REGISTER_GRANULE = 512, 128, 256


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, with the limits that decide occupancy (one multiprocessor or compute unit)."""

    name: str
    backend: str
    arch: int | str
    warp: int  # lanes
    shared_block: int  # bytes of shared memory that one block may ask for
    shared_sm: int
    warps_sm: int
    blocks_sm: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 164 * 1024, 64, 32),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 228 * 1024, 64, 32),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 228 * 1024, 64, 32),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32, 32),
    )
}

_TENSOR = re.compile(r"^(?:[HIDBQ]G?MMA|UTC[A-Z]*MMA|v_s?mfmac?_)\S*")
_WIDE_LOAD = re.compile(
    r"^(?:LDG\S*\.128|LDGSTS\S*\.128|UTMALDG|UBLKCP|global_load_dwordx4|buffer_load_dwordx4|"
    r"global_load_b128|buffer_load_b128)"
)
_SPILL = re.compile(r"^(?:LDL|STL|scratch_load|scratch_store|buffer_load_\S+ .*offen.*scratch)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: opcode with its modifiers, the whole text, the label it may jump to."""

    opcode: str
    text: str


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel is made of. ``shared`` in bytes per block, ``stack`` and ``spills`` 0 when all is well."""

    target: Target
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    assembly: str

    @cached_property
    def instructions(self) -> list[Instruction]:
        """In program order."""
        return _parse(self.assembly)

    @property
    def tensor_instructions(self) -> list[str]:
        """Opcodes of HMMA, HGMMA, UTC*MMA (tcgen05) or v_mfma, as often as they occur."""
        return [i.opcode for i in self.instructions if _TENSOR.match(i.opcode)]

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 16 bytes per lane (or bulk copies)."""
        return sum(bool(_WIDE_LOAD.match(i.opcode)) for i in self.instructions)

    @property
    def fits(self) -> bool:
        """Nothing spilled and the shared memory of a block is within the target's limit."""
        return self.stack == 0 and self.spills == 0 and self.shared <= self.target.shared_block

    @property
    def blocks_per_sm(self) -> int:
        """Resident blocks of one multiprocessor: the least of what registers, shared memory and warp slots allow."""
        t = self.target
        if t.backend == "hip":
            waves = min(8, 512 // _round_up(max(self.registers, 1), 8)) * 4  # 4 SIMDs of 512 registers, 8 waves each
            by_lds = t.shared_sm // _round_up(self.shared, LDS_GRANULE) if self.shared else t.blocks_sm
            return min(waves // self.num_warps, by_lds, t.blocks_sm)
        a_warp = _round_up(max(self.registers, 1) * t.warp, REGISTER_GRANULE)
        by_registers = 4 * (16384 // a_warp) // self.num_warps  # 4 partitions of 16,384 registers
        by_shared = t.shared_sm // _round_up(self.shared + SHARED_RESERVED, SHARED_GRANULE)
        by_tensor_memory = 512 // self.tensor_memory if self.tensor_memory else t.blocks_sm
        return min(by_registers, by_shared, by_tensor_memory, t.warps_sm // self.num_warps, t.blocks_sm)

    @property
    def occupancy(self) -> float:
        """Resident warps over the warp slots of a multiprocessor."""
        return self.blocks_per_sm * self.num_warps / self.target.warps_sm

    def summary(self) -> str:
        return (
            f"{self.target.name}: {self.registers} registers, {self.stack} B stack, {self.spills} spills, "
            f"{self.shared} of {self.target.shared_block} B shared, {len(self.tensor_instructions)} tensor-core "
            f"instructions, {self.wide_loads} 16-byte loads, {self.blocks_per_sm} blocks of {self.num_warps} warps"
        )


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    aligned: Sequence[str] = (),
    **options: Any,
) -> Binary:
    """Compile ``kernel`` for ``target`` without a GPU. The same arguments are compiled once in a process.

    Args:
        kernel: a function under ``@triton.jit`` (of a process without TRITON_INTERPRET).
        signature: type of every run-time argument: "*fp32", "*bf16", "*i64", "i32", "fp32", ...
        constexprs: value of every ``tl.constexpr`` argument; also run-time arguments that Triton would fold (1, None).
        target: a key of ``TARGETS``.
        aligned: integer arguments that are multiples of 16, as strides usually are. Pointers always count as such:
            without it Triton cannot emit 16-byte loads.
        options: further compiler options (``waves_per_eu`` and the like).

    Raises:
        KeyError: unknown target. ValueError: an argument of the kernel without type or value, or interpreted kernel.
    """
    return _compile(
        kernel,
        tuple(signature.items()),
        tuple(constexprs.items()),
        TARGETS[target],
        tuple(aligned),
        (("num_warps", num_warps), ("num_stages", num_stages), *options.items()),
    )


@cache
def _compile(
    kernel: Any, signature: tuple, constexprs: tuple, target: Target, aligned: tuple, options: tuple
) -> Binary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(kernel, triton.JITFunction):
        if not hasattr(kernel, "fn"):
            raise ValueError(f"{kernel} is not a triton.jit kernel; an interpreted process (TRITON_INTERPRET) has none")
        kernel = kernel.fn
    types, values = dict(signature), dict(constexprs)
    missing = [name for name in kernel.arg_names if name not in types and name not in values]
    unknown = [name for name in (*types, *values) if name not in kernel.arg_names]
    if missing or unknown:
        raise ValueError(f"{kernel.__name__}: no type or value for {missing}; not an argument: {unknown}")
    types = {name: "constexpr" if name in values else types[name] for name in kernel.arg_names}
    divisible = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in aligned
    }
    compiled = triton.compile(
        ASTSource(kernel, types, values, divisible),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options=dict(options),
    )
    return read_binary(compiled, target)


@cache
def read_binary(compiled: Any, target: Target) -> Binary:
    """What is in a kernel that Triton compiled for the target."""
    spills, assembly = (_read_amdgcn if target.backend == "hip" else _read_cubin)(compiled.asm)
    metadata = compiled.metadata
    return Binary(
        target,
        metadata.num_warps,
        *read_resources(compiled.asm),
        spills,
        metadata.shared,
        getattr(metadata, "tmem_size", 0),
        assembly,
    )


def read_resources(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers and bytes of stack of one lane, from the ``asm`` of a kernel that Triton compiled."""
    if "amdgcn" in asm:
        keys = ("vgpr_count", "agpr_count", "private_segment_fixed_size")
        vgpr, agpr, stack = (int(re.search(rf"\.{key}:\s+(\d+)", asm["amdgcn"])[1]) for key in keys)
        return max(vgpr, agpr), stack  # on CDNA3 one file of 512 registers serves both kinds; vgpr_count counts both
    usage = _run_on_cubin("cuobjdump", "-res-usage", asm["cubin"])
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _run_on_cubin(tool: str, flag: str, cubin: bytes) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, tool).path, flag, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, str]:
    sass = _run_on_cubin("nvdisasm", "-c", asm["cubin"])
    return sum(bool(_SPILL.match(i.opcode)) for i in _parse(sass)), sass


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, str]:
    text = asm["amdgcn"]
    keys = ("vgpr_spill_count", "sgpr_spill_count")
    return sum(int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in keys), text


def _parse(assembly: str) -> list[Instruction]:
    program: list[Instruction] = []
    for line in assembly.splitlines():
        if sass := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*?);", line):
            program.append(Instruction(sass[1], (sass[1] + sass[2]).strip()))
        elif gcn := re.match(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)", line):
            program.append(Instruction(gcn[1], f"{gcn[1]} {gcn[2]}".strip()))
    return program
