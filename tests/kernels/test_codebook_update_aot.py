"""The kernels of codebook_update, compiled for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.aot import TARGETS, Binary
from bench.gpu_kernels import update_cases

pytest.importorskip("triton")

DIMS = [32, 256]


def compiled(name: str, target: str, dim: int, types: dict[str, str] | None = None, **constexprs: Any) -> Binary:
    """The kernel of bench.gpu_kernels, with other types of its pointers and other constants."""
    case = next(case for case in update_cases(target, d=dim) if case.name == name)
    signature, values = {**case.signature, **(types or {})}, {**case.constexprs, **constexprs}
    values = {name: value for name, value in values.items() if name not in signature}
    return replace(case, signature=signature, constexprs=values).compile(target)


def check(binary: Binary, wide_loads: int = 0) -> None:
    assert binary.fits, binary.summary()
    assert binary.wide_loads >= wide_loads, binary.summary()
    assert binary.occupancy >= 0.25, binary.summary()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
def test_statistics_fit_and_load_16_bytes(target, dim):
    check(compiled("statistics", target, dim), wide_loads=1)
    # 1024 elements are 4 for each of 256 lanes of gfx942: 8 bytes in bf16.
    check(compiled("statistics", target, dim, {"x": "*bf16"}), wide_loads=0 if target == "gfx942" else 1)
    check(compiled("statistics", target, dim, COSINE=False), wide_loads=1)


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_add_integers_without_waiting_for_the_sum(target):
    opcodes = [i.opcode for i in compiled("statistics", target, 32).instructions]
    if target == "gfx942":
        assert any(op.startswith(("global_atomic_add_x2", "buffer_atomic_add_x2")) for op in opcodes)
    else:
        assert any(op.startswith("RED") and "64" in op for op in opcodes), [
            o for o in opcodes if "RED" in o or "ATOM" in o
        ]
        assert not any(op.startswith("ATOMG") for op in opcodes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("flags", [{}, {"AVERAGE": True}, {"AVERAGE": True, "COSINE": False}])
def test_the_second_pass_fits(target, dim, flags):
    average = {"embed_avg": "*fp32", "totals": "*i64"} if flags else None
    check(compiled("codes", target, dim, average, **flags), wide_loads=1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_division_and_root_are_correctly_rounded(target):
    """MUFU.RCP64H and MUFU.RSQ64H are followed by Newton steps in fp64, none of which exists in fp32."""
    opcodes = [i.opcode for i in compiled("statistics", target, 32).instructions]
    assert any(op.startswith("MUFU.RSQ64H") for op in opcodes) and any(op.startswith("MUFU.RCP64H") for op in opcodes)
    assert not any(op.startswith(("MUFU.RCP", "MUFU.RSQ", "MUFU.SQRT")) and "64H" not in op for op in opcodes)
