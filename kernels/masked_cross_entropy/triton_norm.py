"""Kernels: gather with LayerNorm, and its backward, reading the tokens where they are.

Bytes per masked token of width C: the token and hidden once, forward; the token, dhidden and dtokens once, backward.
Nothing but the memory bounds them; the row stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_row(tokens, positions, row, images, patches, stride_b, stride_n, stride_c, columns, mask):
    """One token in fp32; position -1, which a mask short of tokens leaves, is the last token."""
    position = tl.load(positions + row)
    position = tl.where(position < 0, position + tl.cast(images, tl.int64) * patches, position)
    start = (position // patches) * stride_b + (position % patches) * stride_n
    return tl.load(tokens + start + columns.to(tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalize_rows(
    tokens, positions, weight, bias, hidden, means, rstds, images, patches, C, eps, stride_b, stride_n, stride_c,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """hidden[r] = LayerNorm(tokens[positions[r]]), one program per row; mean and 1/std for the backward."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < C
    x = _load_row(tokens, positions, row, images, patches, stride_b, stride_n, stride_c, columns, mask)
    mean = tl.sum(x, 0) / C
    centered = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / C + eps)
    gamma = tl.load(weight + columns, mask=mask, other=0.0)
    beta = tl.load(bias + columns, mask=mask, other=0.0)
    out = centered * rstd * gamma + beta
    tl.store(hidden + row.to(tl.int64) * C + columns, out.to(hidden.dtype.element_ty), mask=mask)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@triton.jit
def normalize_rows_backward(
    grad_hidden, tokens, positions, weight, means, rstds, grad_rows, partial, rows, images, patches, C,
    stride_b, stride_n, stride_c,
    ROWS: tl.constexpr, WRITE_ROWS: tl.constexpr, WRITE_NORM: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - y mean(g y)) with y = (x - mean) rstd, g = dhidden gamma; one program for ROWS rows,
    whose sums of dhidden y and dhidden are row ``program`` of partial [programs, 2, C]: no atomics, one order."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < C
    gamma = tl.load(weight + columns, mask=mask, other=0.0)
    grad_gamma = tl.zeros((BLOCK_C,), tl.float32)
    grad_beta = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(program * ROWS, tl.minimum((program + 1) * ROWS, rows)):
        x = _load_row(tokens, positions, row, images, patches, stride_b, stride_n, stride_c, columns, mask)
        rstd = tl.load(rstds + row)
        at = tl.cast(row, tl.int64) * C + columns
        grad = tl.load(grad_hidden + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, (x - tl.load(means + row)) * rstd, 0.0)
        if WRITE_ROWS:
            g = grad * gamma
            dx = rstd * (g - tl.sum(g, 0) / C - y * (tl.sum(g * y, 0) / C))
            tl.store(grad_rows + at, dx, mask=mask)
        if WRITE_NORM:
            grad_gamma += grad * y
            grad_beta += grad
    if WRITE_NORM:
        start = partial + program.to(tl.int64) * 2 * C + columns
        tl.store(start, grad_gamma, mask=mask)
        tl.store(start + C, grad_beta, mask=mask)
