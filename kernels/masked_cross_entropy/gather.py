"""The masked positions, and the rows of tokens at them: custom ops that wait for no device and copy no branch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("beitv2_fast::masked_positions", mutates_args=())
def masked_positions(mask: Tensor, num_masked: int | None) -> Tensor:
    """Row-major indices [M] of the True elements of mask [B, N]; with num_masked, M = B * num_masked is known before.

    If the mask disagrees with num_masked: an error on the CPU. Elsewhere, where looking would mean waiting for the
    device, surplus positions are left out and missing ones are -1, which reads the last token.
    """
    flat = mask.flatten()
    if num_masked is None:
        return flat.nonzero()[:, 0]
    return torch.nonzero_static(flat, size=len(mask) * num_masked)[:, 0]


@masked_positions.register_kernel("cpu")
def _(mask: Tensor, num_masked: int | None) -> Tensor:
    positions = mask.flatten().nonzero()[:, 0]
    if num_masked is not None:
        wrong = (mask.sum(1) != num_masked).nonzero()[:, 0]
        if len(wrong):
            image = int(wrong[0])
            raise ValueError(
                f"num_masked = {num_masked}, but image {image} of the batch has {int(mask[image].sum())} masked "
                f"patches ({len(wrong)} of {len(mask)} images differ). Make every mask hold num_masked patches, or "
                "leave num_masked out."
            )
    return positions


@masked_positions.register_fake
def _(mask: Tensor, num_masked: int | None) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size() if num_masked is None else mask.shape[0] * num_masked
    return mask.new_empty(count, dtype=torch.int64)


@torch.library.custom_op("beitv2_fast::masked_gather", mutates_args=())
def gather_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens [B, N, C] of any strides at positions [M] of the flattened [B, N]: [M, C], contiguous."""
    return rows_at(tokens, positions)


@gather_rows.register_fake
def _(tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens.new_empty(positions.shape[0], tokens.shape[2])


@torch.library.custom_op("beitv2_fast::masked_scatter", mutates_args=())
def scatter_rows(rows: Tensor, positions: Tensor, images: int, patches: int) -> Tensor:
    """Zeros [B, N, C] with rows [M, C] at the positions, which all differ: nothing is summed, so no order matters."""
    out = rows.new_zeros(images, patches, rows.shape[1])
    out.view(images * patches, -1)[positions] = rows
    return out


@scatter_rows.register_fake
def _(rows: Tensor, positions: Tensor, images: int, patches: int) -> Tensor:
    return rows.new_empty(images, patches, rows.shape[1])


def _save_positions(ctx, inputs, output) -> None:
    tokens, positions = inputs
    ctx.save_for_backward(positions)
    ctx.images, ctx.patches = tokens.shape[:2]


def _scatter_gradient(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (positions,) = ctx.saved_tensors
    return scatter_rows(grad, positions, ctx.images, ctx.patches), None


def _gather_gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (positions,) = ctx.saved_tensors
    return gather_rows(grad, positions), None, None, None


gather_rows.register_autograd(_scatter_gradient, setup_context=_save_positions)
scatter_rows.register_autograd(
    _gather_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1])
)


def rows_at(tokens: Tensor, positions: Tensor) -> Tensor:
    """gather_rows as plain PyTorch: indexing by image and patch, since flattening a slice would copy it."""
    patches = tokens.shape[1]
    return tokens[positions // patches, positions % patches].contiguous()
