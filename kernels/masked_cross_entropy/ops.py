"""The custom ops of masked_cross_entropy: the losses with their gradients, and what hands those to autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import native_ops
from . import steps
from .chunked import Device, Head, Results, Wanted, accumulation_dtype, empty_results, head_losses
from .gather import scatter_rows

Outputs = tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]


@torch.library.custom_op("beitv2_fast::masked_cross_entropy", mutates_args=())
def masked_cross_entropy_op(
    branches: Sequence[Tensor],
    positions: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    grad_tokens: bool,
    grad_norm: bool,
    grad_head: bool,
) -> Outputs:
    """(losses, correct, gradients...) as in chunked.Results; ``dtype``: of the matrix products' operands."""
    head, wanted = Head(norm_weight, norm_bias, eps, weight, bias), Wanted(grad_tokens, grad_norm, grad_head)
    return _run(branches, positions, labels, head, dtype, wanted, Device(1 << 22))


@masked_cross_entropy_op.register_kernel("cpu")
def _(branches, positions, labels, norm_weight, norm_bias, weight, bias, eps, dtype, grad_tokens, grad_norm, grad_head):
    check_labels(labels, len(positions), len(weight))
    head, wanted = Head(norm_weight, norm_bias, eps, weight, bias), Wanted(grad_tokens, grad_norm, grad_head)
    # Without matrix units for bf16 (AMX), fp32 products are about twice as fast as the libraries' bf16 ones.
    device = Device(1 << 22, softmax_native_, widen=not torch.cpu._is_amx_tile_supported())
    return _run(branches, positions, labels, head, dtype, wanted, device)


@masked_cross_entropy_op.register_kernel("cuda")
def _(branches, positions, labels, norm_weight, norm_bias, weight, bias, eps, dtype, grad_tokens, grad_norm, grad_head):
    from .triton_kernel import device_for  # here, so that the package imports without triton

    if len(labels) != len(positions):
        raise ValueError(_wrong_label_count(labels, len(positions)))
    head, wanted = Head(norm_weight, norm_bias, eps, weight, bias), Wanted(grad_tokens, grad_norm, grad_head)
    return _run(branches, positions, labels, head, dtype, wanted, device_for(dtype))


@masked_cross_entropy_op.register_fake
def _(branches, positions, labels, norm_weight, norm_bias, weight, bias, eps, dtype, grad_tokens, grad_norm, grad_head):
    head, wanted = Head(norm_weight, norm_bias, eps, weight, bias), Wanted(grad_tokens, grad_norm, grad_head)
    shapes = empty_results(branches, positions, head, dtype, wanted)
    count = len(branches)
    return tuple(
        shapes._replace(
            losses=branches[0].new_empty(count, dtype=accumulation_dtype(dtype)),
            correct=branches[0].new_empty(count, dtype=torch.int64),
        )
    )


def _run(branches, positions, labels, head: Head, dtype: torch.dtype, wanted: Wanted, device: Device) -> Results:
    # Every cast is written out: an enclosing autocast has been heard already, when ``dtype`` was chosen.
    with torch.autocast(labels.device.type, enabled=False):
        return tuple(head_losses(branches, positions, labels, head, dtype, wanted, device))


def _wrong_label_count(labels: Tensor, rows: int) -> str:
    return (
        f"masked_cross_entropy: {len(labels)} labels for {rows} masked tokens; labels holds one code for each "
        "masked patch, row-major, as masked_gather(codes[..., None], mask)[:, 0] gives them."
    )


def check_labels(labels: Tensor, rows: int, classes: int) -> None:
    if len(labels) != rows:
        raise ValueError(_wrong_label_count(labels, rows))
    if rows and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"masked_cross_entropy: labels must lie in [0, {classes}), the rows of weight; they span "
            f"[{int(labels.min())}, {int(labels.max())}]. Is the tokenizer's codebook larger than the head?"
        )


def softmax_native_(logits, bias, labels, losses, correct, gradient, grad_bias) -> None:
    """steps.softmax_ by the compiled op, which knows fp32: low-precision logits are widened and narrowed."""
    if losses.dtype != torch.float32 or not native_ops():
        return steps.softmax_(logits, bias, labels, losses, correct, gradient, grad_bias)
    wide = logits.float()
    torch.ops.beitv2_fast_cpu.softmax_cross_entropy_(wide, bias, labels, losses, correct, gradient, grad_bias)
    if gradient and wide is not logits:
        logits.copy_(wide)


@torch.library.custom_op("beitv2_fast::with_gradient", mutates_args=())
def with_gradient(losses: Tensor, x: Tensor, gradient: Tensor, rows: int, positions: Tensor | None) -> Tensor:
    """losses [L], whose gradient by x is known: gradient [L, *x.shape] / max(rows, 1), or by positions, at which
    the rows gradient [L, M, C] are the gradient by x [B, N, C] and elsewhere it is 0."""
    return losses.clone()


@with_gradient.register_fake
def _(losses, x, gradient, rows, positions):
    return torch.empty_like(losses)


@torch.library.custom_op("beitv2_fast::with_gradient_backward", mutates_args=())
def with_gradient_backward(upstream: Tensor, gradient: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """sum_l upstream_l / max(rows, 1) * gradient_l in fp32 (fp64 stays), then rounded to dtype; an op of its own,
    without a derivative, so that differentiating twice is an error and not a wrong number."""
    factors = upstream.to(gradient.dtype) * (1.0 / max(rows, 1))
    if len(factors) == 1:
        return (gradient[0] * factors).to(dtype)
    return torch.mv(gradient.flatten(1).t(), factors).view(gradient.shape[1:]).to(dtype)


@with_gradient_backward.register_fake
def _(upstream, gradient, rows, dtype):
    return gradient.new_empty(gradient.shape[1:], dtype=dtype)


def _save_gradient(ctx, inputs, output) -> None:
    _, x, gradient, ctx.rows, positions = inputs
    ctx.save_for_backward(gradient, positions)
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _known_gradient(ctx, upstream: Tensor):
    gradient, positions = ctx.saved_tensors
    grad_x = with_gradient_backward(upstream, gradient, ctx.rows, ctx.dtype)
    if positions is not None:
        grad_x = scatter_rows(grad_x, positions, *ctx.shape[:2])
    return upstream, grad_x, None, None, None


with_gradient.register_autograd(_known_gradient, setup_context=_save_gradient)
