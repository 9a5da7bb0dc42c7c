"""codebook_search as a custom op for CPUs and GPUs. An output that was not asked for is a tensor of size 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..counter_random import random_bits
from ..native import native_ops
from ..registration import Op, custom_op
from .reference import codebook_search_reference, draw_codes_reference

TRITON = find_spec("triton") is not None
MOST_NEAREST = 64  # codes of a vector that the GPU's kernel keeps in registers
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # indices, normalized, codes, distances

Search = TypeVar("Search", bound=Callable[..., Any])


def _one_by_one(search: Search) -> Search:
    """``search``, which knows one codebook, also for several, [G, K, D]: row i belongs to that of number i % G."""

    @wraps(search)
    def search_each(x: Tensor, codebook: Tensor, *rest: Any) -> Any:
        if codebook.dim() == 2:
            return search(x, codebook, *rest)
        groups = len(codebook)
        parts = [
            search(x[g::groups], codes, *(r[g::groups] if isinstance(r, Tensor) else r for r in rest))
            for g, codes in enumerate(codebook)
        ]
        if isinstance(parts[0], Tensor):
            return torch.stack(parts, 1).flatten(0, 1)
        return tuple(torch.stack(part, 1).flatten(0, 1) for part in zip(*parts, strict=True))

    return cast(Search, search_each)


def _register_kernels(
    op: Op, fits: Callable[..., bool] = lambda *rest: True, given: Callable[..., tuple[Any, ...]] = lambda *rest: rest
) -> None:
    """The versions in C++ and Triton of ``op(x, codebook, metric, *rest)``, which get ``given(*rest)``; its definition
    serves float64, and what does not fit the GPU's kernel."""
    name = op._name

    @op.register_kernel("cpu")
    @_one_by_one
    def on_cpu(x: Tensor, codebook: Tensor, metric: str, *rest: Any) -> Any:
        if torch.float64 in (x.dtype, codebook.dtype) or not native_ops():
            return op._init_fn(x, codebook, metric, *rest)
        return getattr(torch.ops.beitv2_fast_cpu, name)(x, codebook, metric == "cosine", *given(*rest))

    @op.register_kernel("cuda")
    def on_cuda(x: Tensor, codebook: Tensor, metric: str, *rest: Any) -> Any:
        if torch.float64 in (x.dtype, codebook.dtype) or not TRITON or not fits(*rest):
            return op._init_fn(x, codebook, metric, *rest)
        from . import triton  # here, so that the package imports without triton

        return getattr(triton, f"{name}_triton")(x, codebook, metric, *given(*rest))


@custom_op("beitv2_fast::codebook_search")
@_one_by_one
def codebook_search_op(
    x: Tensor, codebook: Tensor, metric: str, return_normalized: bool, return_codes: bool, return_distances: bool
) -> Outputs:
    indices, normalized = codebook_search_reference(x, codebook, metric)
    codes = codebook[indices] if return_codes or return_distances else codebook.new_empty(0)
    distances = normalized.new_empty(0)
    if return_distances:
        distances = (normalized - codes.float()).square().sum(-1)
        distances.masked_fill_(~x.isfinite().all(-1), torch.nan)
    return (
        indices,
        normalized if return_normalized else normalized.new_empty(0),
        codes if return_codes else codebook.new_empty(0),
        distances,
    )


@codebook_search_op.register_fake
def _codebook_search_fake(
    x: Tensor, codebook: Tensor, metric: str, return_normalized: bool, return_codes: bool, return_distances: bool
) -> Outputs:
    rows = x.shape[0]
    return (
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(x.shape if return_normalized else 0, dtype=torch.float32),
        codebook.new_empty((rows, codebook.shape[-1]) if return_codes else 0),
        x.new_empty(rows if return_distances else 0, dtype=torch.float32),
    )


@custom_op("beitv2_fast::nearest_codes")
@_one_by_one
def nearest_codes_op(x: Tensor, codebook: Tensor, metric: str, k: int) -> Tensor:
    return codebook_search_reference(x, codebook, metric, k)[0]


@nearest_codes_op.register_fake
def _nearest_codes_fake(x: Tensor, codebook: Tensor, metric: str, k: int) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


draw_codes_op = custom_op("beitv2_fast::draw_codes")(_one_by_one(draw_codes_reference))


@draw_codes_op.register_fake
def _draw_codes_fake(x: Tensor, codebook: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


_register_kernels(codebook_search_op)
_register_kernels(nearest_codes_op, lambda k: k <= MOST_NEAREST)
# Keys are made within the op: traced by inductor, compiled draws failed, with torch 2.11 by a corrupted heap.
_register_kernels(draw_codes_op, given=lambda temperature, key, numbers: (temperature, random_bits(key, numbers)))
