"""Kernels: a residual added and the sum normalized, row by row, and the derivative.

Nothing but the memory bounds them: a row stays in registers. Bytes per element, of a stream in fp32 and a branch in
bf16: 12 forward (x, branch; sum, norm) and 18 backward (both gradients from above, sum, branch; both gradients).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def residual_norm_rows(
    x, branch, gamma, keep, weight, bias, total, norm, means, rstds, C, rows_per_image, inverse_keep_rate, eps,
    HAS_BRANCH: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per row; mean and 1/std are for the backward."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < C
    at = row.to(tl.int64) * C + columns
    s = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        b = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_GAMMA:
            b *= tl.load(gamma + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_KEEP:
            b *= tl.load(keep + row // rows_per_image).to(tl.float32) * inverse_keep_rate
        rounded = (s + b).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        s = rounded.to(tl.float32)  # what is normalized is what the backward will read
    if HAS_NORM:
        mean = tl.sum(s, 0) / C
        centered = tl.where(mask, s - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / C + eps)
        w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(norm + at, (centered * rstd * w + c).to(norm.dtype.element_ty), mask=mask)
        tl.store(means + row, mean)
        tl.store(rstds + row, rstd)


@triton.jit
def residual_norm_rows_backward(
    grad_sum, grad_norm, total, means, rstds, branch, gamma, keep, weight, grad_x, grad_branch, partial,
    rows, rows_per_program, C, rows_per_image, inverse_keep_rate,
    HAS_SUM: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_KEEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dsum + rstd (g - mean(g) - y mean(g y)) with y = (s - mean) rstd, g = dnorm weight.

    One program for ``rows_per_program`` rows, BLOCK_R at a time, whose sums of dx branch, dnorm y and dnorm are row
    ``program`` of partial [programs, parameters, C]: no atomics, one order. Without a norm dx is dsum
    and not written.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    if HAS_NORM:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        of_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        of_bias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if HAS_GAMMA:
        scale = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
        of_gamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    end = tl.minimum((program + 1) * rows_per_program, rows)
    for first in range(program * rows_per_program, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * C + columns[None, :]
        dx = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if HAS_SUM:
            dx += tl.load(grad_sum + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            grad = tl.load(grad_norm + at, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstds + row, mask=row < end, other=0.0)[:, None]
            y = tl.where(mask, (s - tl.load(means + row, mask=row < end, other=0.0)[:, None]) * rstd, 0.0)
            g = grad * w[None, :]
            dx += rstd * (g - (tl.sum(g, 1) / C)[:, None] - y * (tl.sum(g * y, 1) / C)[:, None])
            tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask=mask)
            of_weight += grad * y
            of_bias += grad
        if HAS_BRANCH:
            if HAS_KEEP:
                kept = tl.load(keep + row // rows_per_image, mask=row < end, other=0.0).to(tl.float32)
                dx *= (kept * inverse_keep_rate)[:, None]
            if HAS_GAMMA:
                of_gamma += tl.where(mask, dx, 0.0) * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
                dx *= scale[None, :]
            tl.store(grad_branch + at, dx.to(grad_branch.dtype.element_ty), mask=mask)
    start = partial + program.to(tl.int64) * (HAS_GAMMA + 2 * HAS_NORM) * C + columns
    if HAS_GAMMA:
        tl.store(start, tl.sum(of_gamma, 0), mask=inside)
    if HAS_NORM:
        tl.store(start + HAS_GAMMA * C, tl.sum(of_weight, 0), mask=inside)
        tl.store(start + (HAS_GAMMA + 1) * C, tl.sum(of_bias, 0), mask=inside)
