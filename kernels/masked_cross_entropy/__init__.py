"""masked_gather and masked_cross_entropy: the masked tokens, and the MIM head's loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import masked_cross_entropy_reference, masked_gather_reference


def masked_gather(tokens: Tensor, mask: Tensor, *, num_masked: int | None = None) -> Tensor:
    """The tokens at masked positions, in row-major order.

    Args:
        tokens: [B, N, C]. mask: [B, N] bool.
        num_masked: masked positions of each image, when all have the same number (block masks do): the result's shape
            is then known and the host does not wait for the device.

    Returns:
        [M, C] with M = B * num_masked, or the number of True in the mask.
    """
    _check_mask("masked_gather", [tokens], mask)
    return masked_gather_reference(tokens, mask, num_masked)


def masked_cross_entropy(
    branches: Sequence[Tensor],
    mask: Tensor,
    labels: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    num_masked: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the shared head on the masked tokens of each branch.

    For branch b with masked tokens t_i: ``logits_i = W LayerNorm(t_i) + c``,
    ``loss_b = mean_i(logsumexp(logits_i) - logits_i[label_i])`` and ``correct_b = #{i : argmax(logits_i) = label_i}``.

    Args:
        branches: tensors [B, N, C], e.g. the last layer's patch tokens and the aggregation branch's.
        mask: [B, N] bool. labels: [M] int64, the codes of the masked patches in row-major order.
        norm_weight, norm_bias: [C]; eps: of the LayerNorm. weight: [V, C]; bias: [V] or None.
        num_masked: see ``masked_gather``.

    Returns:
        (losses [len(branches)] fp32, correct [len(branches)] int64).

    Source: arXiv 2208.06366 eq. 5 (the MIM loss) and section 2.3 (the shared head).
    """
    _check_mask("masked_cross_entropy", branches, mask)
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"masked_cross_entropy: labels must be int64 [M]; got {labels.dtype} {tuple(labels.shape)}")
    if weight.dim() != 2 or weight.shape[1] != branches[0].shape[-1]:
        raise ValueError(
            f"masked_cross_entropy: weight must be [V, {branches[0].shape[-1]}]; got {tuple(weight.shape)}"
        )
    return masked_cross_entropy_reference(branches, mask, labels, norm_weight, norm_bias, weight, bias, eps, num_masked)


def _check_mask(op: str, branches: Sequence[Tensor], mask: Tensor) -> None:
    if not branches:
        raise ValueError(f"{op}: no tokens were given")
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"{op}: mask must be bool [B, N]; got {mask.dtype} {tuple(mask.shape)}")
    for tokens in branches:
        if tokens.dim() != 3 or tokens.shape[:2] != mask.shape:
            raise ValueError(
                f"{op}: tokens must be [B, N, C] = [{mask.shape[0]}, {mask.shape[1]}, C] as the mask says; "
                f"got {tuple(tokens.shape)}. Leave the CLS token out."
            )
