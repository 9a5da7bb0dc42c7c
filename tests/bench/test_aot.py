"""Compiling without a GPU: what bench.aot reads from a binary must be what is in it."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, Binary, compile_kernel

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _best_score(x, codes, out, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr):
    rows, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    a = tl.load(x + rows[:, None] * D + d[None, :], mask=rows[:, None] < N, other=0.0)
    best = tl.full((BLOCK_N, BLOCK_K), -float("inf"), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        b = tl.load(codes + columns[:, None] * D + d[None, :], mask=columns[:, None] < K, other=0.0)
        best = tl.maximum(best, tl.dot(a, b.T))
    tl.store(out + rows, tl.max(best, 1), mask=rows < N)


def _compile(target: str, block_n: int = 64, block_k: int = 128, d: int = 32, **options) -> Binary:
    signature = {"x": "*bf16", "codes": "*bf16", "out": "*fp32", "N": "i32", "K": "i32"}
    return compile_kernel(_best_score, signature, {"BLOCK_N": block_n, "BLOCK_K": block_k, "D": d}, target, **options)


@pytest.mark.parametrize(
    ("target", "tensor_core"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTC"), ("gfx942", "v_mfma")]
)
def test_a_good_kernel_is_seen_as_good(target: str, tensor_core: str) -> None:
    binary = _compile(target)
    assert binary.fits, binary.summary()
    assert binary.tensor_instructions and all(op.startswith(tensor_core) for op in binary.tensor_instructions)
    assert binary.wide_loads >= 2, binary.summary()
    assert 32 < binary.registers <= 255
    assert binary.blocks_per_sm >= 1 and 0 < binary.occupancy <= 1


def test_spills_are_seen() -> None:
    binary = _compile("sm_80", block_n=128, block_k=256, num_warps=4)
    assert binary.spills > 0 and not binary.fits, binary.summary()


def test_too_much_shared_memory_is_seen() -> None:
    binary = _compile("gfx942", block_n=64, block_k=256, d=256, num_stages=3)
    assert binary.shared > 64 * 1024 and not binary.fits, binary.summary()


def test_occupancy_is_the_least_of_the_limits() -> None:
    def blocks(target: str = "sm_90", warps: int = 4, registers: int = 32, shared: int = 0) -> int:
        return Binary(TARGETS[target], warps, registers, 0, 0, shared, 0, "").blocks_per_sm

    # By hand from the tables of the CUDA programming guide and the CDNA3 instruction set guide.
    assert blocks() == 16  # 64 warp slots
    assert blocks(registers=255) == 2  # 8 warps of 256 x 32 registers in 65,536
    assert blocks(registers=128, warps=8) == 2
    assert blocks(shared=100 * 1024) == 2  # 228 KiB
    assert blocks("sm_80", shared=100 * 1024) == 1  # 164 KiB
    assert blocks("gfx942", registers=128) == 4  # 4 waves a SIMD
    assert blocks("gfx942", shared=40 * 1024) == 1  # 64 KiB of LDS


def test_an_argument_without_type_is_named() -> None:
    with pytest.raises(ValueError, match="'codes'"):
        compile_kernel(_best_score, {"x": "*bf16"}, {}, "sm_90")
