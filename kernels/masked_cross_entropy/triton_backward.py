"""Kernels: known gradients times the upstream one, and rows scattered among zeros. Both are bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weigh(gradient, upstream, out, L, size, scale, stride_l, stride_u, BLOCK: tl.constexpr):
    """out[i] = sum_l upstream[l] scale gradient[l, i], in fp32: L + 1 elements move for each of out."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for branch in range(L):
        factor = tl.load(upstream + branch * stride_u).to(tl.float32) * scale
        total += tl.load(gradient + tl.cast(branch, tl.int64) * stride_l + at, mask=at < size, other=0.0) * factor
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def scatter_rows_kernel(
    rows, positions, factor, out, M, tokens, C, scale, steps,
    WEIGH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [tokens, C]: the row whose position it is (WEIGH: times factor and scale, in fp32), or 0. The M positions
    ascend, so that ``steps`` halvings find a token's; -1, which a mask short of tokens leaves at the end, is the last
    token, and its last row stays."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    low = tl.zeros((BLOCK_T,), tl.int32)
    high = tl.zeros((BLOCK_T,), tl.int32) + M
    for _ in range(steps):  # low: how many positions are at most the token
        searching = low < high
        middle = (low + high) // 2
        position = tl.load(positions + middle, mask=searching, other=0)
        after = searching & (tl.where(position < 0, tokens - 1, position) <= token)
        high = tl.where(searching & (after == 0), middle, high)
        low = tl.where(after, middle + 1, low)
    row = tl.maximum(low - 1, 0)
    position = tl.load(positions + row, mask=low > 0, other=0)
    found = (low > 0) & (tl.where(position < 0, tokens - 1, position) == token)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        values = tl.load(rows + row.to(tl.int64)[:, None] * C + columns[None, :], mask=found[:, None] & inside, other=0)
        if WEIGH:
            weighed = values * (tl.load(factor).to(tl.float32) * scale)
            values = tl.where(found[:, None], weighed, 0.0).to(out.dtype.element_ty)  # 0 Inf is NaN
        tl.store(
            out + token.to(tl.int64)[:, None] * C + columns[None, :], values, mask=(token < tokens)[:, None] & inside
        )
