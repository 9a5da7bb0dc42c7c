"""Attention's backward on a GPU, without atomics: every sum has a fixed order, so that two runs give the same bits.

With p = softmax(s) and dp = grad v^T: ``ds = p (dp - delta)``, where ``delta = rowsum(out grad)``.

| kernel | one program per | writes | products |
|---|---|---|---|
| query_gradients | (queries, head, chunk of images) | dq, delta; with DBIAS partial sums of the bias's gradient | 3 |
| key_gradients | (keys, head, image), on transposed scores: p^T and ds^T are operands as they come | dk, dv | 4 |
| bias_gradients | (queries x keys, head, chunk), where N is too long for DBIAS | partial sums of that gradient | 2 |

Products of 2 B H N^2 d FLOPs each. Beyond N q, grad, lse and delta are read as 0: ``ds = p (0 - 0)`` adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import masked_scores, read_rows, scores


@triton.jit
def gradient(
    q, k, v, do, bias, lse, delta, n, factor, N: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """ds of a block of keys: [queries, keys]."""
    p = tl.exp2(masked_scores(q, k, bias, n, N, SIDE, BIAS, MASKED) * factor - lse[:, None])
    return p * (tl.dot(do, tl.trans(v)) - delta[:, None])


@triton.jit(do_not_specialize=["images", "chunk"])
def query_gradients(
    qkv, bias, out, grad, lse, delta, dqkv, partial, images, chunk, factor, scale,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr,
    DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq, delta [B, H, N] and, with DBIAS, partial [chunks, H, N, N].

    Registers decide: 64 x 208 sums are 104 of the 255, and the address of every block kept for the next image would
    take as many. So the loop over images hoists nothing (``disable_licm``), and its counter passes through an operation
    that changes nothing but hides that the addresses grow evenly with it.
    """
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    m, h, part = pid % blocks * BLOCK_M, pid // blocks % H, pid // (blocks * H)
    W: tl.constexpr = 3 * H * D
    row, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = row < N - m
    bias += h.to(tl.int64) * (SIDE * SIDE) + m * SIDE
    sums = ()
    if DBIAS:
        for _ in tl.static_range(FULL):
            sums = sums + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # noqa: RUF005
        sums = sums + (tl.zeros([BLOCK_M, TAIL], tl.float32),)  # noqa: RUF005
    last = tl.minimum(part * chunk + chunk, images)
    for image in tl.range(part * chunk, last, num_stages=1, disable_licm=True):
        b = tl.cast(image ^ (images >> 30), tl.int64)  # = image
        q_at, one, line = qkv + b * (N * W) + h * D, b * (N * H * D) + h * D, (b * H + h) * N + m
        k_at, v_at = q_at + H * D, q_at + 2 * H * D
        q = read_rows(q_at, m, BLOCK_M, W, D, BLOCK_D, N, True)
        do = read_rows(grad + one, m, BLOCK_M, H * D, D, BLOCK_D, N, True)
        o = read_rows(out + one, m, BLOCK_M, H * D, D, BLOCK_D, N, True)
        lse_m = tl.load(lse + line + row, mask=inside, other=0.0)
        delta_m = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + line + row, delta_m, mask=inside)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if DBIAS:
            for j in tl.static_range(FULL):
                k = read_rows(k_at, j * BLOCK_N, BLOCK_N, W, D, BLOCK_D, N, False)
                v = read_rows(v_at, j * BLOCK_N, BLOCK_N, W, D, BLOCK_D, N, False)
                ds = gradient(q, k, v, do, bias, lse_m, delta_m, j * BLOCK_N, factor, N, SIDE, BIAS, False)
                sums = sums[:j] + (sums[j] + ds,) + sums[j + 1 :]  # noqa: RUF005
                dq = tl.dot(ds.to(k.dtype), k, dq)
        else:
            for j in tl.range(0, FULL, num_stages=STAGES):
                k = read_rows(k_at, j * BLOCK_N, BLOCK_N, W, D, BLOCK_D, N, False)
                v = read_rows(v_at, j * BLOCK_N, BLOCK_N, W, D, BLOCK_D, N, False)
                ds = gradient(q, k, v, do, bias, lse_m, delta_m, j * BLOCK_N, factor, N, SIDE, BIAS, False)
                dq = tl.dot(ds.to(k.dtype), k, dq)
        n = FULL * BLOCK_N
        k, v = read_rows(k_at, n, TAIL, W, D, BLOCK_D, N, True), read_rows(v_at, n, TAIL, W, D, BLOCK_D, N, True)
        ds = gradient(q, k, v, do, bias, lse_m, delta_m, n, factor, N, SIDE, BIAS, True)
        if DBIAS:
            sums = sums[:FULL] + (sums[FULL] + ds,)  # noqa: RUF005
        dq = tl.dot(ds.to(k.dtype), k, dq)
        where = dqkv + b * (N * W) + h * D + m * W + (row[:, None] * W + d[None, :])
        tl.store(where, (dq * scale).to(dqkv.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))
    if DBIAS:
        partial += (part.to(tl.int64) * H + h) * (N * N) + m * N
        for j in tl.static_range(FULL):
            at = row[:, None] * N + (j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            tl.store(partial + at, sums[j], mask=inside[:, None])
        column = FULL * BLOCK_N + tl.arange(0, TAIL)[None, :]
        tl.store(partial + (row[:, None] * N + column), sums[FULL], mask=inside[:, None] & (column < N))


@triton.jit
def add_queries(
    k, v, q_at, grad, lse, delta, bias, m, dk, dv, factor,
    COUNT: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr,
    BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a block of queries gives to dk and dv. Keys beyond N may become NaN: nobody stores or mixes them."""
    q = read_rows(q_at, m, COUNT, 3 * H * D, D, BLOCK_D, N, MASKED)
    do = read_rows(grad, m, COUNT, H * D, D, BLOCK_D, N, MASKED)
    row = tl.arange(0, COUNT)
    lse_m = tl.load(lse + m + row, mask=row < N - m, other=0.0)
    delta_m = tl.load(delta + m + row, mask=row < N - m, other=0.0)
    p = tl.exp2(scores(k, q, bias + m, SIDE, BIAS) * factor - lse_m[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv)
    ds = p * (tl.dot(v, tl.trans(do)) - delta_m[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv


@triton.jit
def key_gradients(
    qkv, transposed, grad, lse, delta, dqkv, factor, scale,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M keys, queries in blocks of BLOCK_N; ``transposed``: the packed bias, keys x queries."""
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    n, h, b = pid % blocks * BLOCK_M, pid // blocks % H, (pid // (blocks * H)).to(tl.int64)
    W: tl.constexpr = 3 * H * D
    at, line = qkv + b * (N * W) + h * D, (b * H + h) * N
    lse, delta, grad = lse + line, delta + line, grad + b * (N * H * D) + h * D
    bias = transposed + h.to(tl.int64) * (SIDE * SIDE) + n * SIDE
    k = read_rows(at + H * D, n, BLOCK_M, W, D, BLOCK_D, N, True)
    v = read_rows(at + 2 * H * D, n, BLOCK_M, W, D, BLOCK_D, N, True)
    dk, dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, FULL, num_stages=STAGES):
        dk, dv = add_queries(
            k, v, at, grad, lse, delta, bias, i * BLOCK_N, dk, dv, factor, BLOCK_N, N, H, D, BLOCK_D, SIDE, BIAS, False
        )
    m = FULL * BLOCK_N
    dk, dv = add_queries(
        k, v, at, grad, lse, delta, bias, m, dk, dv, factor, TAIL, N, H, D, BLOCK_D, SIDE, BIAS, True
    )  # fmt: skip
    row, d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    where, inside = dqkv + b * (N * W) + (H + h) * D + n * W + (row * W + d), (row < N - n) & (d < D)
    tl.store(where, (dk * scale).to(dqkv.dtype.element_ty), mask=inside)
    tl.store(where + H * D, dv.to(dqkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images", "chunk"])
def bias_gradients(
    qkv, bias, grad, lse, delta, partial, images, chunk, factor,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial [chunks, H, N, N]: ds summed over a chunk of images."""
    down: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    tile, h, part = pid % (down * across), pid // (down * across) % H, pid // (down * across * H)
    m, n = tile // across * BLOCK_M, tile % across * BLOCK_N
    W: tl.constexpr = 3 * H * D
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    bias += h.to(tl.int64) * (SIDE * SIDE) + m * SIDE
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum(part * chunk + chunk, images)
    for image in tl.range(part * chunk, last, num_stages=1, disable_licm=True):
        b = tl.cast(image ^ (images >> 30), tl.int64)  # = image, as in query_gradients
        q_at, line = qkv + b * (N * W) + h * D, (b * H + h) * N + m
        q = read_rows(q_at, m, BLOCK_M, W, D, BLOCK_D, N, True)
        do = read_rows(grad + b * (N * H * D) + h * D, m, BLOCK_M, H * D, D, BLOCK_D, N, True)
        k = read_rows(q_at + H * D, n, BLOCK_N, W, D, BLOCK_D, N, True)
        v = read_rows(q_at + 2 * H * D, n, BLOCK_N, W, D, BLOCK_D, N, True)
        lse_m = tl.load(lse + line + row, mask=row < N - m, other=0.0)
        delta_m = tl.load(delta + line + row, mask=row < N - m, other=0.0)
        sums += gradient(q, k, v, do, bias, lse_m, delta_m, n, factor, N, SIDE, True, False)
    partial += (part.to(tl.int64) * H + h) * (N * N) + m * N + n
    inside = (row[:, None] < N - m) & (column[None, :] < N - n)
    tl.store(partial + (row[:, None] * N + column[None, :]), sums, mask=inside)
