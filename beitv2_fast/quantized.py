"""What a quantizer returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """What a quantizer returns.

    quantized: of the input's shape and dtype. indices: int64, the input's shape without the channels, and [..., heads]
    with several heads. loss: scalar fp32, 0 in a batch of no vectors. counts: int64 [K], how often each code was
    chosen in this batch over all ranks ([heads, K] with separate codebooks).
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp(entropy) of the codes' frequencies in this batch: [] or [heads]."""
        return perplexity(self.counts)


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of frequencies counts / sum: [..., K] -> [...] float64."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))
