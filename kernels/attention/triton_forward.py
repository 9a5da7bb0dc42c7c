"""Attention's forward on a GPU, and what both directions share: the packed bias, rows of a matrix, a block of scores.

FLOPs 4 B H N^2 d. Bytes: qkv read and out written once; the packed bias, which all images share, comes from L2.
Neither bounds it on an H100, but the latency of one block of keys after the other.

Keys are walked in FULL blocks of BLOCK_N and one TAIL of 16, 32, ...: 197 keys cost 208 columns, not 256. N, H and D
are constants, so that only the tail's loads are masked. Scores are counted in units of 1 / scale, ``s = q k^T + bias /
scale``: the packed bias then is the accumulator that the product starts from, and takes no registers beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # where a maximum starts: from -inf, a block of keys that are all masked would give NaN


@triton.jit
def pack_bias(
    bias, packed, inverse, stride_h, stride_m, stride_n, N: tl.constexpr, SIDE: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """packed [2, H, SIDE, SIDE]: bias * inverse as queries x keys, keys from N on at -inf; as keys x queries."""
    blocks: tl.constexpr = SIDE // BLOCK
    pid = tl.program_id(0)
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = pid // blocks % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    h = (pid // (blocks * blocks)).to(tl.int64)
    at = bias + h * stride_h + i.to(tl.int64) * stride_m + j.to(tl.int64) * stride_n
    x = tl.load(at, mask=(i < N) & (j < N), other=0.0).to(tl.float32) * inverse
    packed += h * SIDE * SIDE
    tl.store(packed + (i * SIDE + j), tl.where(j < N, x, float("-inf")).to(packed.dtype.element_ty))
    tl.store(packed + H * SIDE * SIDE + (j * SIDE + i), x.to(packed.dtype.element_ty))


@triton.jit
def read_rows(
    pointer, start, COUNT: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``start``, ... of an [N, D] matrix whose rows lie ``W`` apart: [COUNT, BLOCK_D], zeros beyond D and N."""
    row, d = tl.arange(0, COUNT)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = pointer + start * W + (row * W + d)  # what all lanes share goes into the pointer: it takes no registers
    if MASKED and D < BLOCK_D:
        return tl.load(at, mask=(row < N - start) & (d < D), other=0.0)
    if MASKED:
        return tl.load(at, mask=row < N - start, other=0.0)
    if D < BLOCK_D:
        return tl.load(at, mask=d < D, other=0.0)
    return tl.load(at)


@triton.jit
def scores(q, k, bias, SIDE: tl.constexpr, BIAS: tl.constexpr):
    """q k^T, in fp32, onto the packed bias if there is one; ``bias`` points to the block's first element."""
    if BIAS:
        at = tl.arange(0, q.shape[0])[:, None] * SIDE + tl.arange(0, k.shape[0])[None, :]
        return tl.dot(q, tl.trans(k), tl.load(bias + at).to(tl.float32))
    return tl.dot(q, tl.trans(k))


@triton.jit
def masked_scores(
    q, k, bias, n, N: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """scores of keys ``n``, ..., those from N on at -inf."""
    s = scores(q, k, bias + n, SIDE, BIAS)
    if MASKED and not BIAS:
        s = tl.where(tl.arange(0, k.shape[0])[None, :] < N - n, s, float("-inf"))
    return s


@triton.jit
def add_keys(
    q, k, v, bias, acc, top, total, n, factor, N: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A block of keys into the running softmax."""
    s = masked_scores(q, k, bias, n, N, SIDE, BIAS, MASKED)
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * factor - (new * factor)[:, None])
    shrink = tl.exp2((top - new) * factor)
    return tl.dot(p.to(v.dtype), v, acc * shrink[:, None]), new, total * shrink + tl.sum(p, 1)


@triton.jit
def attention_forward(
    qkv, bias, out, lse, factor,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (BLOCK_M queries, head, image): out [B, N, H, D], and lse [B, H, N] of
    ``p = 2^(s factor - lse)``, with factor = scale log2(e)."""
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    m, h, b = pid % blocks * BLOCK_M, pid // blocks % H, (pid // (blocks * H)).to(tl.int64)
    W: tl.constexpr = 3 * H * D
    q_at = qkv + b * (N * W) + h * D
    k_at, v_at = q_at + H * D, q_at + 2 * H * D
    bias += h.to(tl.int64) * (SIDE * SIDE) + m * SIDE
    q = read_rows(q_at, m, BLOCK_M, W, D, BLOCK_D, N, True)
    acc, total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    for j in tl.range(0, FULL, num_stages=STAGES):
        k = read_rows(k_at, j * BLOCK_N, BLOCK_N, W, D, BLOCK_D, N, False)
        v = read_rows(v_at, j * BLOCK_N, BLOCK_N, W, D, BLOCK_D, N, False)
        acc, top, total = add_keys(q, k, v, bias, acc, top, total, j * BLOCK_N, factor, N, SIDE, BIAS, False)
    n = FULL * BLOCK_N
    k, v = read_rows(k_at, n, TAIL, W, D, BLOCK_D, N, True), read_rows(v_at, n, TAIL, W, D, BLOCK_D, N, True)
    acc, top, total = add_keys(q, k, v, bias, acc, top, total, n, factor, N, SIDE, BIAS, True)
    row, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    where = out + b * (N * H * D) + h * D + m * (H * D) + (row[:, None] * (H * D) + d[None, :])
    inside = (row[:, None] < N - m) & (d[None, :] < D)
    tl.store(where, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (b * H + h) * N + m + row, top * factor + tl.log2(total), mask=row < N - m)
