"""masked_gather and masked_cross_entropy: the masked tokens, and the MIM head's loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import ParameterGradients, TokenGradients, gather_rows, masked_cross_entropy_op, masked_positions


def masked_gather(tokens: Tensor, mask: Tensor, *, num_masked: int | None = None) -> Tensor:
    """The tokens at masked positions, in row-major order; differentiable.

    Args:
        tokens: [B, N, C] of any dtype and strides: a slice such as ``tokens[:, 1:]`` is not copied.
        mask: [B, N] bool.
        num_masked: masked positions of each image, when all have the same number (block masks do): the result's shape
            is then known and the host does not wait for the device.

    Returns:
        [M, C] with M = B * num_masked, or the number of True in the mask.

    Raises:
        ValueError: wrong shapes; on the CPU also a mask that disagrees with num_masked. A GPU would have to be waited
            for, so there surplus positions are left out and missing ones read the batch's last token.
    """
    _check_mask("masked_gather", [tokens], mask)
    rows: Tensor = gather_rows(tokens, masked_positions(mask, num_masked))
    return rows


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
    ``loss_b = mean_i(logsumexp(logits_i) - logits_i[label_i])`` and ``correct_b = #{i : argmax(logits_i) = label_i}``
    (of equal logits the lowest index counts; a token with a NaN logit is never correct). The [M, V] logits are never in
    memory, only chunks of them. The gradients are computed along with the losses, if grad mode is on and an input
    requires one; each branch's loss may then be weighted at will, but not differentiated twice (an error).

    Args:
        branches: tensors [B, N, C] of any strides, e.g. the last layer's patch tokens and the aggregation branch's.
        mask: [B, N] bool. With a CLS token in front, give all tokens and ``F.pad(mask, (1, 0))``: of a slice the whole
            gradient is written twice.
        labels: [M] int64, the codes of the masked patches in row-major order.
        norm_weight: [C], of the LayerNorm.
        norm_bias: [C].
        weight: [V, C], W.
        bias: [V], c, or None.
        eps: of the LayerNorm.
        num_masked: see ``masked_gather``.

    Precision: the LayerNorm, softmax and losses are computed in fp32, sums of products in fp32. The products' operands
    are the autocast dtype under autocast, else the widest of the tokens' and the weight's; fp64 is fp64 throughout.

    Returns:
        (losses [len(branches)] fp32 (fp64 if computed so), correct [len(branches)] int64). No masked token: 0 and 0.

    Raises:
        ValueError: wrong shapes, dtypes or devices; on the CPU also a mask that disagrees with num_masked, and labels
            that are too many, too few or outside [0, V). A GPU is not waited for: there such a label gives a NaN loss.

    Source: arXiv 2208.06366 eq. 5 (the MIM loss) and section 2.3 (the shared head).
    """
    _check_mask("masked_cross_entropy", branches, mask)
    _check_head(branches, labels, norm_weight, norm_bias, weight, bias)
    norm, head = [norm_weight, norm_bias], [weight] if bias is None else [weight, bias]
    tracked = torch.is_grad_enabled()
    wanted = [tracked and any(t.requires_grad for t in group) for group in (branches, norm, head)]
    positions = masked_positions(mask, num_masked)
    with torch.no_grad():
        losses, correct, grad_rows, of_parameters = masked_cross_entropy_op(
            list(branches), positions, labels, *norm, weight, bias, eps, _product_dtype(branches, weight), *wanted
        )
    rows = positions.shape[0]  # an int to the op: 1 / rows of a ragged mask is no number yet when it is compiled
    if wanted[0]:
        losses = TokenGradients.apply(losses, rows, positions, *branches, *grad_rows)
    if wanted[1] or wanted[2]:
        losses = ParameterGradients.apply(losses, rows, of_parameters, *head * wanted[2], *norm * wanted[1])
    return losses, correct


def _product_dtype(branches: Sequence[Tensor], weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    dtype = weight.dtype
    for tokens in branches:
        dtype = torch.promote_types(dtype, tokens.dtype)
    return dtype


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
        if tokens.device != mask.device:
            raise ValueError(f"{op}: tokens are on {tokens.device}, the mask on {mask.device}; move one of them.")


def _check_head(
    branches: Sequence[Tensor],
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    op, dim = "masked_cross_entropy", branches[0].shape[-1]
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels must be int64 [M]; got {labels.dtype} {tuple(labels.shape)}")
    if weight.dim() != 2 or weight.shape[1] != dim or not weight.shape[0]:
        raise ValueError(f"{op}: weight must be [V, {dim}] with V >= 1; got {tuple(weight.shape)}")
    for name, tensor, size in (
        ("norm_weight", norm_weight, dim),
        ("norm_bias", norm_bias, dim),
        ("bias", bias, weight.shape[0]),
    ):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{op}: {name} must be [{size}]; got {tuple(tensor.shape)}")
    for name, tensor in (("labels", labels), ("norm_weight", norm_weight), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != branches[0].device:
            raise ValueError(f"{op}: {name} must be on {branches[0].device} as the tokens are; got {tensor.device}")
    for name, tensor in (*(("tokens", tokens) for tokens in branches), ("weight", weight)):
        if not tensor.is_floating_point() or tensor.shape[-1] != dim:
            raise ValueError(
                f"{op}: {name} must be floating point [..., {dim}]; got {tensor.dtype} {tuple(tensor.shape)}"
            )
