"""The first pass of codebook_update on a GPU: counts and fixed-point sums of the vectors that chose each code.

FLOPs about 6 N D in fp64. Bytes: N (D + 2) elements read, and N (D + 1) integer additions made by the second-level
cache into the [K, 1 + D] result; these bound it. When many vectors chose one code, its additions queue up at one
address: so each program first adds up, in registers, the rows of the code that is most frequent among its own.

The arithmetic is reference.py's, bit for bit: integers are summed, and floating-point products are exact in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS_BITS = tl.constexpr(0x3D719799812DEA11)  # 1e-12 in fp64
EXPONENT = tl.constexpr(2047 << 52)
TWICE_BIAS = tl.constexpr(2046 << 52)
NO_EXPONENT = tl.constexpr(0x7F800000)  # of fp32: NaN and Inf are at or above, as integers without sign
SQUARE_ROUND = tl.constexpr(96.0)  # 1.5 * 2^(52 - 46): added to a double, leaves a multiple of 2^-46 in its low bits
UNIT_ROUND = tl.constexpr(98304.0)  # 1.5 * 2^(52 - 36)
INTEGER_ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52


@triton.jit
def to_fixed(value, round: tl.constexpr):
    """The integer number of steps, to nearest even; the step is set by ``round``."""
    shifted = value + round
    origin = tl.full([1], round, tl.float64).to(tl.int64, bitcast=True)
    return shifted.to(tl.int64, bitcast=True) - origin


@triton.jit
def magnitudes(x):
    """The largest magnitude of each row of fp32 [R, C], as the integer of its bits: NaN and Inf above all numbers."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def unit_factors(x):
    """Rows x [R, C] fp32 -> (factor [R] fp64 with l2(x) = x * factor, finite [R])."""
    magnitude = magnitudes(x)
    finite = magnitude < NO_EXPONENT
    largest = tl.where(finite, magnitude, 0).to(tl.float32, bitcast=True).to(tl.float64)
    down = (-(largest.to(tl.int64, bitcast=True) & EXPONENT) + TWICE_BIAS).to(tl.float64, bitcast=True)
    scaled = tl.where(finite[:, None], x, 0.0).to(tl.float64) * down[:, None]
    squares = tl.sum(to_fixed(scaled * scaled, SQUARE_ROUND), axis=1)
    eps = tl.full([1], EPS_BITS, tl.int64).to(tl.float64, bitcast=True)
    norm = tl.maximum(tl.sqrt(squares.to(tl.float64)) * (1.0 / 8388608.0), eps * down)
    return (1.0 / norm).to(tl.float32).to(tl.float64) * down, finite


@triton.jit
def most_frequent(code, counted, BLOCK_N: tl.constexpr):
    """The code that most of the counted rows of a tile have."""
    same = (code[:, None] == code[None, :]) & counted[:, None] & counted[None, :]
    votes = tl.sum(same.to(tl.int32), axis=1) * BLOCK_N + tl.arange(0, BLOCK_N)  # distinct
    return tl.sum(tl.where(votes == tl.max(votes, axis=0), code, 0), axis=0)


@triton.jit
def add_rows(out, rows_out, counted, shared, shared_out, values, offs_d, D: tl.constexpr):
    """Adds rows of integers to their codes' sums; those of the shared code first to each other."""
    mask_d = offs_d < D
    together = tl.sum(tl.where(shared[:, None], values, 0), axis=0)
    tl.atomic_add(
        out + shared_out + offs_d, together, mask=mask_d & (tl.max(shared.to(tl.int32), axis=0) > 0), sem="relaxed"
    )
    single = (counted & (shared == 0))[:, None] & mask_d[None, :]
    tl.atomic_add(out + rows_out[:, None] + offs_d[None, :], values, mask=single, sem="relaxed")


@triton.jit
def statistics_kernel(
    x,
    indices,
    out,
    N,
    K,
    groups,
    stride_n,
    stride_d,
    stride_i,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < D
    code = tl.load(indices + offs_n * stride_i, mask=mask_n, other=-1)
    tl.device_assert((code >= -1) & (code < K), "codebook_update: an index lies outside -1..K-1")
    inside = (code >= 0) & (code < K)
    code += offs_n % groups * K  # of codebooks to which the rows belong in turn
    pointers = x + offs_n[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    rows = tl.load(pointers, mask=mask_n[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    WIDTH: tl.constexpr = 1 + D if COSINE else 1 + 2 * D
    if COSINE:
        factor, finite = unit_factors(rows)
        counted = inside & finite
    else:
        counted = inside & (magnitudes(rows) < 0x4F800000)  # 2^32
    common = most_frequent(code, counted, BLOCK_N)
    shared = counted & (code == common)
    first, common_first = code * WIDTH, common * WIDTH
    number = tl.sum(shared.to(tl.int64), axis=0)
    tl.atomic_add(out + common_first, number, mask=number > 0, sem="relaxed")
    tl.atomic_add(out + first, counted.to(tl.int64), mask=counted & (shared == 0), sem="relaxed")
    rows = tl.where(counted[:, None], rows, 0.0).to(tl.float64)
    if COSINE:
        steps = to_fixed(rows * factor[:, None], UNIT_ROUND)
        add_rows(out, first + 1, counted, shared, common_first + 1, steps, offs_d, D)
    else:
        coarse = to_fixed(rows * 16.0, INTEGER_ROUND)
        fine = to_fixed((rows - coarse.to(tl.float64) * 0.0625) * 1099511627776.0, INTEGER_ROUND)
        add_rows(out, first + 1, counted, shared, common_first + 1, coarse, offs_d, D)
        add_rows(out, first + 1 + D, counted, shared, common_first + 1 + D, fine, offs_d, D)
