"""The definitions of masked_gather and masked_cross_entropy in plain PyTorch: the [M, V] logits are written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_gather_reference(tokens: Tensor, mask: Tensor, num_masked: int | None) -> Tensor:
    flat = mask.flatten()
    positions = flat.nonzero() if num_masked is None else torch.nonzero_static(flat, size=len(mask) * num_masked)
    return tokens.flatten(0, 1)[positions[:, 0]]


def masked_cross_entropy_reference(
    branches: Sequence[Tensor],
    mask: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    num_masked: int | None,
) -> tuple[Tensor, Tensor]:
    losses, correct = [], []
    for tokens in branches:
        masked = masked_gather_reference(tokens, mask, num_masked)  # [M, C]
        hidden = F.layer_norm(masked, masked.shape[-1:], norm_weight, norm_bias, eps)
        logits = F.linear(hidden, weight, bias)  # [M, V]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # The mean over no masked token is 0, not NaN.
        losses.append(F.cross_entropy(logits, labels) if len(labels) else logits.sum())
        correct.append(((logits.argmax(-1) == labels) & ~logits.isnan().any(-1)).sum())
    return torch.stack(losses), torch.stack(correct)
