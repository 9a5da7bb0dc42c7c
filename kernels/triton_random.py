"""counter_random.py in kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .counter_random import GAMMA, MIX1, MIX2, wrapped

STEP, FACTOR_1, FACTOR_2 = (tl.constexpr(wrapped(number)) for number in (GAMMA, MIX1, MIX2))


@triton.jit
def random_bits(key, k):
    z = key + k.to(tl.int64) * STEP
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * FACTOR_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * FACTOR_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def uniform(key, k):
    """``as_uniform(random_bits(key, k))``"""
    return ((random_bits(key, k) >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16
