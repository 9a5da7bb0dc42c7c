"""Random numbers that are a function of a key and a counter: any of them can be had without those before it, on any
device, with the same bits (splitmix64, Steele et al. 2014, entered at key + k * GAMMA).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

GAMMA, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_bits(keys: Any, k: Any) -> Any:
    """64 bits of int64 for each key and counter, which broadcast: tensors, numpy's arrays, or one of them an int."""
    z = keys + wrapped(k * wrapped(GAMMA))
    z = (z ^ (z >> 30 & 2**34 - 1)) * wrapped(MIX1)
    z = (z ^ (z >> 27 & 2**37 - 1)) * wrapped(MIX2)
    return z ^ (z >> 31 & 2**33 - 1)


def as_uniform(bits: Tensor) -> Tensor:
    """The upper 53 bits as float64 in [0, 1)."""
    return (bits >> 11 & 2**53 - 1).double() * 2.0**-53


def wrapped(value: Any) -> Any:
    """The int64 with the same low 64 bits: what a tensor's arithmetic makes of it."""
    return (value + 2**63) % 2**64 - 2**63 if isinstance(value, int) else value
