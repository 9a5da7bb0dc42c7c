"""attention on NVIDIA and AMD GPUs, bf16 and fp16: the launches of triton_forward and triton_backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gpu import cdiv, device_of, next_power_of_2, target_name
from .triton_backward import bias_gradients, key_gradients, query_gradients
from .triton_forward import attention_forward, pack_bias

LOG2E = math.log2(math.e)
PACK_BLOCK = 64
PROGRAMS, TILES = 264, 528  # that sum the bias's gradient: constants, so that all GPUs of a kind give the same bits


@dataclass(frozen=True)
class Blocks:
    """What a program of a kernel has at a time: its own BLOCK_M rows, and the BLOCK_N that it walks over."""

    m: int
    n: int
    num_warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Plan:
    """The blocks of every kernel, for so many tokens and heads of this width at most.

    together: of query_gradients with DBIAS; None: too many registers, so bias_gradients is launched as well.
    """

    tokens: int
    width: int
    forward: Blocks
    keys: Blocks
    queries: Blocks
    bias: Blocks
    together: Blocks | None = None


LONG = 1 << 30
# sm_90: the fastest of those measured on an H100 with 65, 197 and 577 tokens and a width of 64. The others, and wider
# heads, have not been measured: blocks without spilled registers.
PLANS = {
    "sm_80": (
        Plan(LONG, 64, Blocks(64, 32), Blocks(32, 32), Blocks(32, 32), Blocks(64, 32)),
        Plan(LONG, 128, Blocks(32, 32), Blocks(32, 16, 8), Blocks(32, 16, 8), Blocks(32, 32)),
    ),
    "sm_90": (
        Plan(128, 64, Blocks(128, 64, 8), Blocks(64, 64), Blocks(64, 64), Blocks(64, 64), Blocks(64, 64)),
        Plan(208, 64, Blocks(128, 64, 8), Blocks(64, 32), Blocks(64, 32, 4, 2), Blocks(64, 64), Blocks(64, 64)),
        Plan(LONG, 64, Blocks(64, 64, 4, 2), Blocks(64, 32), Blocks(64, 32, 4, 2), Blocks(64, 64)),
        Plan(LONG, 128, Blocks(64, 64), Blocks(64, 16), Blocks(64, 32), Blocks(64, 64)),
    ),
    "sm_100": (Plan(LONG, 64, *4 * [Blocks(64, 64)]), Plan(LONG, 128, *4 * [Blocks(64, 32)])),
    "gfx942": (Plan(LONG, 128, *4 * [Blocks(32, 32)]),),
}
PLANS["interpreter"] = PLANS["sm_90"]


def choose_plan(tokens: int, width: int) -> Plan:
    plans = PLANS[target_name()]
    return next(plan for plan in plans if tokens <= plan.tokens and width <= plan.width)


def attention_triton(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, N, H, d] and lse [B, H, N] in fp32, for the backward."""
    B, N, _, H, d = qkv.shape
    out, lse = qkv.new_empty(B, N, H, d), qkv.new_empty(B, H, N, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    with device_of(qkv):
        blocks = choose_plan(N, d).forward
        packed, _ = _pack(bias, qkv, scale)
        attention_forward[(cdiv(N, blocks.m) * H * B,)](
            qkv.contiguous(), packed, out, lse, scale * LOG2E, BIAS=bias is not None, **walk(blocks, N),
            **_shape(qkv),
        )  # fmt: skip
    return out, lse


def attention_backward_triton(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor | None, lse: Tensor, scale: float, of_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv, contiguous, and of the bias [H, N, N] in fp32 (empty without ``of_bias``)."""
    B, N, _, H, d = qkv.shape
    dqkv, delta, none = qkv.new_empty(qkv.shape), lse.new_empty(lse.shape), lse.new_empty(0)
    if out is None or out.numel() == 0:
        return dqkv, lse.new_zeros(H, N, N) if of_bias else none
    grad, qkv, out, lse = (x.contiguous() for x in (grad, qkv, out, lse))
    factor, partial, chunk = scale * LOG2E, none, 1
    shape = _shape(qkv) | {"BIAS": bias is not None}
    with device_of(qkv):
        plan = choose_plan(N, d)
        packed, transposed = _pack(bias, qkv, scale)
        blocks = plan.together if of_bias and plan.together else plan.queries
        together = of_bias and plan.together is not None
        programs = cdiv(N, blocks.m) * H
        if together:
            partial, chunk = _partial(lse, programs, PROGRAMS)
        query_gradients[(programs * cdiv(B, chunk),)](
            qkv, packed, out, grad, lse, delta, dqkv, partial, B, chunk, factor, scale, DBIAS=together,
            **walk(blocks, N), **shape,
        )  # fmt: skip
        blocks = plan.keys
        key_gradients[(cdiv(N, blocks.m) * H * B,)](
            qkv, transposed, grad, lse, delta, dqkv, factor, scale, **walk(blocks, N), **shape
        )
        if of_bias and not together:
            blocks = plan.bias
            programs = cdiv(N, blocks.m) * cdiv(N, blocks.n) * H
            partial, chunk = _partial(lse, programs, TILES)
            bias_gradients[(programs * len(partial),)](
                qkv, packed, grad, lse, delta, partial, B, chunk, factor, BLOCK_M=blocks.m, BLOCK_N=blocks.n,
                num_warps=blocks.num_warps, **_shape(qkv),
            )  # fmt: skip
    return dqkv, (partial.sum(0) if len(partial) > 1 else partial[0]) if of_bias else none


def _pack(bias: Tensor | None, qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The bias as the kernels start from it, in qkv's dtype, and its transpose; without a bias nobody reads them."""
    if bias is None:
        return qkv, qkv
    H, N, _ = bias.shape
    length = side(N)
    packed = qkv.new_empty(2, H, length, length)
    pack_bias[((length // PACK_BLOCK) ** 2 * H,)](
        bias, packed, 1 / scale, *bias.stride(), N=N, SIDE=length, H=H, BLOCK=PACK_BLOCK
    )
    return packed[0], packed[1]


def _partial(lse: Tensor, programs: int, most: int) -> tuple[Tensor, int]:
    """Sums of chunks of so many images, as many as make about ``most`` programs, of which each has its own."""
    B, H, N = lse.shape
    chunk = cdiv(B, max(1, min(B, most // programs)))
    return lse.new_empty(cdiv(B, chunk), H, N, N), chunk


def side(tokens: int) -> int:
    """Of the packed bias: a multiple of all blocks, so that none reads beyond it."""
    return cdiv(tokens, 128) * 128


def block_d(width: int) -> int:
    return max(16, next_power_of_2(width))


def _shape(qkv: Tensor) -> dict[str, int]:
    _, N, _, H, d = qkv.shape
    return {"N": N, "H": H, "D": d, "BLOCK_D": block_d(d), "SIDE": side(N)}


def walk(blocks: Blocks, tokens: int) -> dict[str, Any]:
    """Blocks of a kernel, and how it walks over the tokens: in full blocks and a shorter tail."""
    full = (tokens - 1) // blocks.n
    tail = max(16, next_power_of_2(tokens - full * blocks.n))
    return {
        "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "FULL": full, "TAIL": tail, "STAGES": blocks.stages,
        "num_warps": blocks.num_warps,
    }  # fmt: skip
