"""The custom ops of masked_gather and masked_cross_entropy: the masked positions and the rows of tokens at them, the
losses with their gradients, and what hands those to autograd. None copies a branch; with num_masked none waits for a
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..cpu import FAST_BF16
from ..native import native_ops
from ..registration import custom_op
from .chunked import Device, Head, Results, Wanted, accumulation_dtype, empty_results, head_losses, rows_at, softmax_

Outputs = tuple[Tensor, Tensor, list[Tensor], Tensor]


@custom_op("beitv2_fast::masked_positions")
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
def _masked_positions_cpu(mask: Tensor, num_masked: int | None) -> Tensor:
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
def _masked_positions_fake(mask: Tensor, num_masked: int | None) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size() if num_masked is None else mask.shape[0] * num_masked
    return mask.new_empty(count, dtype=torch.int64)


@custom_op("beitv2_fast::masked_gather")
def gather_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens [B, N, C] of any strides at positions [M] of the flattened [B, N]: [M, C], contiguous."""
    return rows_at(tokens, positions)


@gather_rows.register_fake
def _masked_gather_fake(tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens.new_empty(positions.shape[0], tokens.shape[2])


@custom_op("beitv2_fast::masked_scatter")
def scatter_rows(rows: Tensor, positions: Tensor, images: int, patches: int) -> Tensor:
    """Zeros [B, N, C] with rows [M, C] at the positions, which ascend: nothing is summed, so no order matters."""
    out = rows.new_zeros(images, patches, rows.shape[1])
    out.view(images * patches, -1)[positions] = rows
    return out


@scatter_rows.register_kernel("cuda")
def _masked_scatter_cuda(rows: Tensor, positions: Tensor, images: int, patches: int) -> Tensor:
    from .triton import scatter_rows_triton

    return scatter_rows_triton(rows, positions, images, patches)


@scatter_rows.register_fake
def _masked_scatter_fake(rows: Tensor, positions: Tensor, images: int, patches: int) -> Tensor:
    return rows.new_empty(images, patches, rows.shape[1])


def _save_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, positions = inputs
    ctx.save_for_backward(positions)
    ctx.images, ctx.patches = tokens.shape[:2]


def _scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (positions,) = ctx.saved_tensors
    return scatter_rows(grad, positions, ctx.images, ctx.patches), None


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (positions,) = ctx.saved_tensors
    return gather_rows(grad, positions), None, None, None


gather_rows.register_autograd(_scatter_gradient, setup_context=_save_positions)
scatter_rows.register_autograd(
    _gather_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1])
)


@custom_op("beitv2_fast::masked_cross_entropy")
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
    arguments = (norm_weight, norm_bias, weight, bias, eps, dtype, grad_tokens, grad_norm, grad_head)
    return _run(partial(head_losses, device=Device(1 << 22)), branches, positions, labels, *arguments)


@masked_cross_entropy_op.register_kernel("cpu")
def _masked_cross_entropy_cpu(branches: Sequence[Tensor], positions: Tensor, labels: Tensor, *rest: Any) -> Outputs:
    _, _, weight, _, _, dtype, *_ = rest
    check_labels(labels, len(positions), len(weight))
    widen = not (FAST_BF16 and dtype == torch.bfloat16)
    device = Device(1 << (22 if widen else 21), softmax_native_, widen)  # which widens narrow logits, beside them
    return _run(partial(head_losses, device=device), branches, positions, labels, *rest)


@masked_cross_entropy_op.register_kernel("cuda")
def _masked_cross_entropy_cuda(branches: Sequence[Tensor], positions: Tensor, labels: Tensor, *rest: Any) -> Outputs:
    from .triton import head_losses_triton  # here, so that the package imports without triton

    if len(labels) != len(positions):
        raise ValueError(_wrong_label_count(labels, len(positions)))
    return _run(head_losses_triton, branches, positions, labels, *rest)


@masked_cross_entropy_op.register_fake
def _masked_cross_entropy_fake(branches: Sequence[Tensor], positions: Tensor, labels: Tensor, *rest: Any) -> Outputs:
    norm_weight, norm_bias, weight, bias, eps, dtype, *wanted = rest
    head = Head(norm_weight, norm_bias, eps, weight, bias)
    shapes, count = empty_results(branches, positions, head, dtype, Wanted(*wanted)), len(branches)
    return shapes._replace(
        losses=branches[0].new_empty(count, dtype=accumulation_dtype(dtype)),
        correct=branches[0].new_empty(count, dtype=torch.int64),
    )[:4]


def _run(
    run: Callable[..., Results], branches: Sequence[Tensor], positions: Tensor, labels: Tensor, *rest: Any
) -> Outputs:
    norm_weight, norm_bias, weight, bias, eps, dtype, *wanted = rest
    head = Head(norm_weight, norm_bias, eps, weight, bias)
    # Every cast is written out: an enclosing autocast has been heard already, when ``dtype`` was chosen.
    with torch.autocast(labels.device.type, enabled=False):
        return run(branches, positions, labels, head, dtype, Wanted(*wanted))[:4]


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


def softmax_native_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    gradient: bool,
    grad_bias: Tensor | None,
) -> None:
    """softmax_ by the compiled op, which knows fp32: low-precision logits are widened and narrowed."""
    if losses.dtype != torch.float32 or not native_ops():
        return softmax_(logits, bias, labels, losses, correct, gradient, grad_bias)
    wide = logits.float()
    torch.ops.beitv2_fast_cpu.softmax_cross_entropy_(wide, bias, labels, losses, correct, gradient, grad_bias)
    if gradient and wide is not logits:
        logits.copy_(wide)


def watched(upstream: Tensor) -> Tensor:
    """The upstream gradient; while a graph is made of the backward, one that requires a gradient: so differentiating
    what is computed of it is an error, where it would be taken for a constant."""
    return upstream.detach().requires_grad_() if torch.is_grad_enabled() and not upstream.requires_grad else upstream


class TokenGradients(torch.autograd.Function):
    """losses [L], whose gradient by each branch [B, N, C] is known, times max(rows, 1): its rows [M, C] at the
    positions, and elsewhere 0.

    One node for all branches and one for all parameters, as each costs the host as much as kernels do; not one in all,
    as a node frees what it keeps when all its gradients are there.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, rows: int, positions: Tensor, *tokens_and_rows: Tensor) -> Tensor:
        count = len(tokens_and_rows) // 2
        ctx.rows, ctx.like = rows, [(t.shape, t.dtype) for t in tokens_and_rows[:count]]
        ctx.save_for_backward(positions, *tokens_and_rows[count:])
        return losses.detach()  # it may be changed in place, which a view made here may not

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        positions, *rows = ctx.saved_tensors
        factors = watched(upstream)
        grads = [
            with_gradient_backward(factors[b : b + 1], of_branch[None], ctx.rows, dtype, positions, *shape[:2])
            if ctx.needs_input_grad[3 + b]
            else None
            for b, (of_branch, (shape, dtype)) in enumerate(zip(rows, ctx.like, strict=True))
        ]
        return upstream, None, None, *grads, *[None] * len(rows)


class ParameterGradients(torch.autograd.Function):
    """losses [L], whose gradients by the parameters are known, times max(rows, 1): gradient [L, their elements]."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, rows: int, gradient: Tensor, *parameters: Tensor) -> Tensor:
        ctx.rows, ctx.like = rows, [(p.shape, p.dtype) for p in parameters]
        ctx.save_for_backward(gradient)
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        dtype = reduce(torch.promote_types, [dtype for _, dtype in ctx.like])
        weighed = with_gradient_backward(watched(upstream), gradient, ctx.rows, dtype)
        parts = weighed.split([prod(s) for s, _ in ctx.like])
        return upstream, None, None, *(w.view(s).to(d) for w, (s, d) in zip(parts, ctx.like, strict=True))


@custom_op("beitv2_fast::with_gradient_backward")
def with_gradient_backward(
    upstream: Tensor,
    gradient: Tensor,
    rows: int,
    dtype: torch.dtype,
    positions: Tensor | None = None,
    images: int = 0,
    patches: int = 0,
) -> Tensor:
    """sum_l upstream_l / max(rows, 1) * gradient_l in fp32 (fp64 stays), then rounded to dtype; with positions [M] of
    one gradient's rows [1, M, C] scattered to [images, patches, C]. An op of its own, without a derivative, so that
    differentiating twice is an error and not a wrong number."""
    factors = upstream.to(gradient.dtype) * (1.0 / max(rows, 1))
    if len(factors) == 1:
        weighed = (gradient[0] * factors).to(dtype)
    else:
        weighed = torch.mv(gradient.flatten(1).t(), factors).view(gradient.shape[1:]).to(dtype)
    scattered: Tensor = weighed if positions is None else scatter_rows._init_fn(weighed, positions, images, patches)
    return scattered


@with_gradient_backward.register_kernel("cuda")
def _with_gradient_backward_cuda(
    upstream: Tensor, gradient: Tensor, rows: int, dtype: torch.dtype, positions: Tensor | None = None, *shape: int
) -> Tensor:
    from .triton import scatter_rows_triton, weigh_triton

    if gradient.dtype == torch.float64 or not gradient[0].is_contiguous():
        by_definition: Tensor = with_gradient_backward._init_fn(upstream, gradient, rows, dtype, positions, *shape)
        return by_definition
    if positions is None:
        return weigh_triton(upstream, gradient, rows, dtype)
    images, patches = shape
    return scatter_rows_triton(gradient[0], positions, images, patches, upstream, 1.0 / max(rows, 1), dtype)


@with_gradient_backward.register_fake
def _with_gradient_backward_fake(
    upstream: Tensor, gradient: Tensor, rows: int, dtype: torch.dtype, positions: Tensor | None = None, *shape: int
) -> Tensor:
    return gradient.new_empty(gradient.shape[1:] if positions is None else (*shape, gradient.shape[2]), dtype=dtype)
