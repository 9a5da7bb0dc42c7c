"""Kernels: cross entropy of a chunk of logits with its gradient in their place, and without any logits in memory.

``softmax_rows``: a logit is read once and written once; about 10 FLOPs per logit. Bound by memory.
``softmax_gradient``, for rows too long for registers, reads it twice (the second time from the L2 cache).

``linear_loss``, for losses that need no gradient, computes the logits too, for each block of BLOCK_M tokens and part of
the vocabulary: in registers, BLOCK_M x BLOCK_V at a time, on tensor cores; it keeps the running maximum, sum of
exponentials, argmax and target logit of each token. FLOPs 2 M C V; bytes: W once for every block of tokens, through
the L2 cache. Bound by the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def load_logits(logits, bias, columns, mask, HAS_BIAS: tl.constexpr):
    """logits + bias in fp32, -inf outside the mask."""
    x = tl.load(logits + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=mask, other=0.0)
    return tl.where(mask, x, -float("inf"))


@triton.jit
def finite_or_zero(top):
    """What to subtract before exp: of logits that are all -inf (a bias may exclude classes), 0 and not -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def softmax_rows(
    logits, bias, labels, losses, correct, sums, R, V, start,
    HAS_BIAS: tl.constexpr, GRADIENT: tl.constexpr, SUMS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``softmax_gradient`` of rows that fit into registers, R per branch: program (p, branch) takes its rows p, p + P,
    p + 2 P, ... and keeps their column sums, row p of sums [branches, P, V]: no atomics, one order. If start > 0, it
    goes on from what that row holds."""
    program, programs, branch = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK_V)
    mask = columns < V
    own = sums + (branch * programs + program).to(tl.int64) * V + columns
    if SUMS:
        total_gradient = tl.load(own, mask=mask & (start > 0), other=0.0)
    for row in range(program, R, programs):
        at = tl.cast(branch, tl.int64) * R + row
        label = tl.load(labels + row)
        known = (label >= 0) & (label < V)
        column = tl.where(known, label, 0)
        target = tl.load(logits + at * V + column).to(tl.float32)  # before any lane overwrites it
        if HAS_BIAS:
            target += tl.load(bias + column)
        x = load_logits(logits + at * V, bias, columns, mask, HAS_BIAS)
        best = tl.max(x, 0)
        exponentials = tl.exp(x - finite_or_zero(best))
        first = tl.min(tl.where(x == best, columns, NO_INDEX), 0)
        total = tl.sum(exponentials, 0)
        loss = tl.where(known, finite_or_zero(best) + tl.log(total) - target, float("nan"))
        tl.store(losses + at, loss)
        tl.store(correct + at, (first == label) & (loss == loss))
        if GRADIENT:
            gradient = exponentials * (1.0 / total) - tl.where(columns == label, 1.0, 0.0)
            tl.store(logits + at * V + columns, gradient.to(logits.dtype.element_ty), mask=mask)
            if SUMS:
                total_gradient += gradient
    if SUMS:
        tl.store(own, total_gradient, mask=mask)


@triton.jit
def softmax_gradient(
    logits, bias, labels, losses, correct, V,
    HAS_BIAS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: loss = logsumexp - target, correct = (argmax is the label), logits <- softmax - one_hot.

    Each lane keeps a running maximum and sum of its own columns; lanes meet once, after the row. A label outside [0, V)
    meets no column: its target stays NaN, and so does the loss.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    label = tl.load(labels + row)
    top = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    index = tl.full((BLOCK_V,), NO_INDEX, tl.int32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    target = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = load_logits(logits, bias, columns, columns < V, HAS_BIAS)
        higher = tl.where(x > top, x, top)
        index = tl.where(x > top, columns, index)
        total = total * tl.exp(top - finite_or_zero(higher)) + tl.exp(x - finite_or_zero(higher))
        top = higher
        target = tl.where(columns == label, x, target)
    best = tl.max(top, 0)
    shift = finite_or_zero(best)
    sum_exp = tl.sum(total * tl.exp(top - shift), 0)
    first = tl.min(tl.where(top == best, index, NO_INDEX), 0)
    lse = shift + tl.log(sum_exp)
    known = (label >= 0) & (label < V)
    loss = tl.where(known, lse - tl.max(target, 0), float("nan"))
    tl.store(losses + row, loss)
    tl.store(correct + row, (first == label) & (loss == loss))
    if GRADIENT:
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            x = load_logits(logits, bias, columns, columns < V, HAS_BIAS)
            gradient = tl.exp(x - lse) - tl.where(columns == label, 1.0, 0.0)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < V)


@triton.jit
def linear_loss(
    hidden, weight, bias, labels, tops, indices, sums, targets, M, V, C, parts, blocks_of_part,
    HAS_BIAS: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program block of tokens * parts + part (a grid is short in its second size): maximum, lowest index of it, sum
    of e^(x - maximum) and the label's logit over blocks_of_part blocks of the vocabulary, into row ``part`` of tops,
    indices, sums and targets [parts, M]."""
    part = tl.program_id(0) % parts
    rows = tl.program_id(0) // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    label = tl.load(labels + rows, mask=row_mask, other=-1)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    index = tl.full((BLOCK_M,), NO_INDEX, tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    offs_c = tl.arange(0, BLOCK_C)
    a_pointers = hidden + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    first = part * blocks_of_part
    for block in range(first, tl.minimum(first + blocks_of_part, tl.cdiv(V, BLOCK_V))):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        column_mask = columns < V
        b_pointers = weight + columns.to(tl.int64)[None, :] * C + offs_c[:, None]
        x = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start in range(0, C, BLOCK_C):
            if EVEN_C:
                a = tl.load(a_pointers + start, mask=row_mask[:, None], other=0.0)
                b = tl.load(b_pointers + start, mask=column_mask[None, :], other=0.0)
            else:
                inside = offs_c < C - start
                a = tl.load(a_pointers + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
                b = tl.load(b_pointers + start, mask=column_mask[None, :] & inside[:, None], other=0.0)
            x = tl.dot(a, b, x, input_precision="ieee")
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=column_mask, other=0.0)[None, :]
        x = tl.where(column_mask[None, :], x, -float("inf"))
        block_top = tl.max(x, 1)
        block_index = tl.min(tl.where(x == block_top[:, None], columns[None, :], NO_INDEX), 1)
        higher = tl.maximum(top, block_top)
        index = tl.where(block_top > top, block_index, index)
        shift = finite_or_zero(higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        top = higher
        target = tl.maximum(target, tl.max(tl.where(columns[None, :] == label[:, None], x, -float("inf")), 1))
    at = part * M + rows
    tl.store(tops + at, top, mask=row_mask)
    tl.store(indices + at, index, mask=row_mask)
    tl.store(sums + at, total, mask=row_mask)
    tl.store(targets + at, target, mask=row_mask)


@triton.jit
def combine_parts(
    tops, indices, sums, targets, labels, losses, correct, M, V, parts, BLOCK_M: tl.constexpr
):  # fmt: skip
    """losses and correct [M] from the parts, in order: of equal maxima the first part's, which has the lowest index."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < M
    label = tl.load(labels + rows, mask=mask, other=-1)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    index = tl.full((BLOCK_M,), NO_INDEX, tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for part in range(parts):
        at = part * M + rows
        part_top = tl.load(tops + at, mask=mask, other=0.0)
        index = tl.where(part_top > top, tl.load(indices + at, mask=mask, other=0), index)
        higher = tl.maximum(top, part_top)
        shift = finite_or_zero(higher)
        total = total * tl.exp(top - shift) + tl.load(sums + at, mask=mask, other=0.0) * tl.exp(part_top - shift)
        top = higher
        target = tl.maximum(target, tl.load(targets + at, mask=mask, other=0.0))
    known = (label >= 0) & (label < V)
    loss = tl.where(known, finite_or_zero(top) + tl.log(total) - target, float("nan"))
    tl.store(losses + rows, loss, mask=mask)
    tl.store(correct + rows, (index == label) & (loss == loss), mask=mask)
