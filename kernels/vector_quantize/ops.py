"""vector_quantize and its derivative as custom ops, with their autograd rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codebook_search.ops import codebook_search_op
from ..codebook_search.reference import numbered
from ..codebook_update.ops import codebook_statistics
from ..codebook_update.reference import unpack_statistics
from ..native import native_ops
from ..registration import custom_op
from .reference import shortest_of, vector_quantize_backward_reference, vector_quantize_reference


@custom_op("beitv2_fast::vector_quantize")
def quantize(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    commitment_weight: float,
    codebook_weight: float,
    return_compared: bool,
    gradient: str = "straight_through",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The search returns codes and distances in its own pass, on any device: a sum is all that is left to do.
    if x.dtype == torch.float64:
        x = x.contiguous()  # the results take its layout
        weights = commitment_weight, codebook_weight
        results = vector_quantize_reference(x, codebook, metric, *weights, gradient=gradient)
        return *results[:3], results[3].clone() if return_compared else x.new_empty(0)
    unit = return_compared and metric == "cosine"
    indices, normalized, codes, distances = codebook_search_op(x, codebook, metric, unit, True, True)
    loss = distances.sum().mul_((commitment_weight + codebook_weight) / max(1, x.numel()))
    compared = loss.new_empty(0)
    if return_compared:
        as_rows = torch.contiguous_format
        compared = normalized if unit else x.to(torch.float32, copy=True, memory_format=as_rows)
    return codes.float(), indices, loss, compared


@quantize.register_fake
def _quantize_fake(x: Tensor, codebook: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return_compared = rest[3]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty((), dtype=dtype),
        x.new_empty(x.shape if return_compared else 0, dtype=dtype),
    )


@custom_op("beitv2_fast::vector_quantize_backward")
def quantize_backward(
    x: Tensor,
    quantized: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    commitment_weight: float,
    metric: str,
    gradient: str = "straight_through",
) -> Tensor:
    gradients = grad_quantized, grad_loss
    return vector_quantize_backward_reference(x, quantized, *gradients, commitment_weight, metric, gradient)


@quantize_backward.register_fake
def _quantize_backward_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@quantize_backward.register_kernel("cpu")
def _quantize_backward_cpu(x: Tensor, quantized: Tensor, *rest: Any) -> Tensor:
    grad_quantized, grad_loss, commitment_weight, metric, *gradient = rest
    if x.dtype == torch.float64 or not native_ops():
        return vector_quantize_backward_reference(x, quantized, *rest)
    weight = 0.0 if grad_loss is None else 2 * commitment_weight * grad_loss.item() / max(1, x.numel())
    native = torch.ops.beitv2_fast_cpu.vector_quantize_backward
    shortest = shortest_of(x) if gradient == ["rotation"] else -1.0
    grad_x: Tensor = native(x, quantized, grad_quantized, weight, metric == "cosine", shortest)
    return grad_x


@quantize_backward.register_kernel("cuda")
def _quantize_backward_cuda(x: Tensor, *rest: Any) -> Tensor:
    if x.dtype == torch.float64 or rest[5:] == ("rotation",):
        return vector_quantize_backward_reference(x, *rest)
    from .triton import vector_quantize_backward_triton

    return vector_quantize_backward_triton(x, *rest[:5])


@custom_op("beitv2_fast::codebook_gradient")
def codebook_gradient(
    x: Tensor, indices: Tensor, codebook: Tensor, grad_loss: Tensor, codebook_weight: float, metric: str
) -> Tensor:
    # The sum of 2 w / (N D) (v_j - y_i) over the vectors that chose code j.
    codes = codebook.flatten(0, -2)
    groups = len(codes) // codebook.shape[-2]
    statistics = codebook_statistics(x, indices, codebook.shape[-2], metric, groups)
    bins, sums = unpack_statistics(statistics, metric)
    scale = grad_loss.double() * (2 * codebook_weight / max(1, x.numel()))
    gradient = scale * (bins[:, None] * codes.double() - sums)
    return gradient.where(bins[:, None] > 0, 0).to(codebook.dtype).view(codebook.shape).contiguous()


@codebook_gradient.register_fake
def _codebook_gradient_fake(x: Tensor, indices: Tensor, codebook: Tensor, *_: Any) -> Tensor:
    return codebook.new_empty(codebook.shape)


@codebook_gradient.register_kernel("cpu")
def _codebook_gradient_cpu(x: Tensor, indices: Tensor, codebook: Tensor, *rest: Any) -> Tensor:
    if x.dtype == torch.float64 or codebook.dtype != torch.float32 or not native_ops():
        by_definition: Tensor = codebook_gradient._init_fn(x, indices, codebook, *rest)
        return by_definition
    grad_loss, codebook_weight, metric = rest
    codes = codebook.flatten(0, -2).contiguous()
    chosen = numbered(indices, len(codes) // codebook.shape[-2], codebook.shape[-2])
    scale = grad_loss.item() * (2 * codebook_weight / max(1, x.numel()))
    of_codes: Tensor = torch.ops.beitv2_fast_cpu.codebook_gradient(x, chosen, codes, scale, metric == "cosine")
    return of_codes.view(codebook.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, ctx.metric, ctx.commitment_weight, ctx.codebook_weight, _, *gradient = inputs
    ctx.gradient = gradient[0] if gradient else "straight_through"
    quantized, indices, _, compared = output
    ctx.mark_non_differentiable(indices, compared)
    ctx.set_materialize_grads(False)
    ctx.trains_codebook = ctx.codebook_weight != 0 and ctx.needs_input_grad[1]
    ctx.save_for_backward(x, quantized, *((indices, codebook) if ctx.trains_codebook else ()))


def _backward(
    ctx: Any, grad_quantized: Tensor | None, _indices: None, grad_loss: Tensor | None, _compared: None
) -> tuple[Tensor | None, ...]:
    x, quantized, *rest = ctx.saved_tensors
    grad_x = grad_codebook = None
    if ctx.needs_input_grad[0] and not (grad_quantized is None and grad_loss is None):
        how = ctx.commitment_weight, ctx.metric, ctx.gradient
        grad_x = quantize_backward(x, quantized, grad_quantized, grad_loss, *how)
    if ctx.trains_codebook and grad_loss is not None:
        grad_codebook = codebook_gradient(x, *rest, grad_loss, ctx.codebook_weight, ctx.metric)
    return grad_x, grad_codebook, *[None] * (len(ctx.needs_input_grad) - 2)


quantize.register_autograd(_backward, setup_context=_setup_context)
