"""The kernels of codebook_update, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, Binary, compile_kernel

pytest.importorskip("triton")

DIMS = [32, 256]
FLAGS = {"COSINE": True, "AVERAGE": False}


def compile_statistics(target: str, dim: int, dtype: str = "fp32", cosine: bool = True) -> Binary:
    from beitv2_fast.kernels.codebook_update.triton import tile_shape
    from beitv2_fast.kernels.codebook_update.triton_statistics import statistics_kernel

    block_n, block_d = tile_shape(dim)
    signature = {"x": f"*{dtype}", "indices": "*i64", "out": "*i64", "N": "i32", "K": "i32", "stride_n": "i32"}
    blocks = {"D": dim, "COSINE": cosine, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return compile_kernel(
        statistics_kernel, signature, {"stride_d": 1, "stride_i": 1, **blocks}, target, aligned=["stride_n"]
    )


def compile_codes(target: str, dim: int, **flags: bool) -> Binary:
    from beitv2_fast.kernels.codebook_update.triton import APPLY_TILE, tile_shape
    from beitv2_fast.kernels.codebook_update.triton_apply import codes_kernel

    flags = {**FLAGS, **flags}
    block_k, block_d = tile_shape(dim, APPLY_TILE)
    signature = {"statistics": "*i64", "totals": "*i64", "codebook": "*fp32", "cluster_size": "*fp32", "K": "i32"}
    signature |= {"decay": "fp32", "rest": "fp32", "eps": "fp32"} | ({"embed_avg": "*fp32"} if flags["AVERAGE"] else {})
    absent = {} if flags["AVERAGE"] else {"embed_avg": None}
    blocks = {"D": dim, "BLOCK_K": block_k, "BLOCK_D": block_d}
    warps = 2 if target == "gfx942" else 4
    return compile_kernel(codes_kernel, signature, {**absent, **blocks, **flags}, target, num_warps=warps)


def check(binary: Binary, wide_loads: int = 0) -> None:
    assert binary.fits, binary.summary()
    assert binary.wide_loads >= wide_loads, binary.summary()
    assert binary.occupancy >= 0.25, binary.summary()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", DIMS)
def test_statistics_fit_and_load_16_bytes(target, dim):
    check(compile_statistics(target, dim), wide_loads=1)
    # 1024 elements are 4 for each of 256 lanes of gfx942: 8 bytes in bf16.
    check(compile_statistics(target, dim, "bf16"), wide_loads=0 if target == "gfx942" else 1)
    check(compile_statistics(target, dim, cosine=False), wide_loads=1)


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_add_integers_without_waiting_for_the_sum(target):
    opcodes = [i.opcode for i in compile_statistics(target, 32).instructions]
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
    check(compile_codes(target, dim, **flags), wide_loads=1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_division_and_root_are_correctly_rounded(target):
    """MUFU.RCP64H and MUFU.RSQ64H are followed by Newton steps in fp64, none of which exists in fp32."""
    opcodes = [i.opcode for i in compile_statistics(target, 32).instructions]
    assert any(op.startswith("MUFU.RSQ64H") for op in opcodes) and any(op.startswith("MUFU.RCP64H") for op in opcodes)
    assert not any(op.startswith(("MUFU.RCP", "MUFU.RSQ", "MUFU.SQRT")) and "64H" not in op for op in opcodes)
