"""Random numbers that are a function of a key and a counter: any of them can be had without those before it, on any
device, with the same bits (splitmix64, Steele et al. 2014, entered at key + k * GAMMA).
"""

from __future__ import annotations

from torch import Tensor

GAMMA, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_bits(keys: Tensor | int, k: Tensor) -> Tensor:
    """64 bits of int64 for each key and counter, which broadcast; int64 arithmetic wraps as uint64's does."""

    def signed(value: int) -> int:
        return value - 2**64 if value >= 2**63 else value

    z = keys + k * signed(GAMMA)
    z = (z ^ (z >> 30 & 2**34 - 1)) * signed(MIX1)
    z = (z ^ (z >> 27 & 2**37 - 1)) * signed(MIX2)
    return z ^ (z >> 31 & 2**33 - 1)


def as_uniform(bits: Tensor) -> Tensor:
    """The upper 53 bits as float64 in [0, 1)."""
    return (bits >> 11 & 2**53 - 1).double() * 2.0**-53
