"""Kernel: cross entropy of a chunk of logits and, in their place, its gradient.

Bytes a logit: read twice (the second time from the L2 cache), written once; about 10 FLOPs. Bound by memory.
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
def softmax_gradient(
    logits, bias, labels, losses, correct, V,
    HAS_BIAS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row: loss = logsumexp - target, correct = (argmax is the label), logits <- softmax - one_hot.

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
