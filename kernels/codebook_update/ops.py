"""The two passes of codebook_update as custom ops; the dispatcher picks the version for the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import native_ops
from .reference import apply_statistics_reference, codebook_statistics_reference


@torch.library.custom_op("beitv2_fast::codebook_statistics", mutates_args=())
def codebook_statistics(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> Tensor:
    return codebook_statistics_reference(x, indices, num_codes, metric)


@codebook_statistics.register_fake
def _(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> Tensor:
    limbs = 1 if metric == "cosine" else 2
    return x.new_empty(num_codes, 1 + limbs * x.shape[1], dtype=torch.int64)


@codebook_statistics.register_kernel("cpu")
def _(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> Tensor:
    if not native_ops():
        _check_range(indices, num_codes)
        return codebook_statistics_reference(x, indices, num_codes, metric)
    return torch.ops.beitv2_fast_cpu.codebook_statistics(x, indices, num_codes, metric == "cosine")


@codebook_statistics.register_kernel("cuda")
def _(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> Tensor:
    from .triton_kernel import codebook_statistics_triton

    return codebook_statistics_triton(x, indices, num_codes, metric)


def _check_range(indices: Tensor, num_codes: int) -> None:
    if len(indices) and (indices.min() < -1 or indices.max() >= num_codes):
        raise IndexError(
            f"codebook_update: indices must lie in 0..{num_codes - 1}, or be -1 for vectors not to be counted; "
            f"got {indices.min().item()}..{indices.max().item()}"
        )


@torch.library.custom_op(
    "beitv2_fast::apply_codebook_statistics", mutates_args=("codebook", "cluster_size", "embed_avg")
)
def apply_statistics(
    statistics: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    decay: float,
    metric: str,
    eps: float,
) -> Tensor:
    return apply_statistics_reference(statistics, codebook, cluster_size, embed_avg, decay, metric, eps)


@apply_statistics.register_fake
def _(statistics, codebook, cluster_size, embed_avg, decay, metric, eps):
    return statistics.new_empty(statistics.shape[0])


@apply_statistics.register_kernel("cpu")
def _(statistics, *state_and_options):
    *state, decay, metric, eps = state_and_options
    if not native_ops() or not _all_contiguous(state):
        return apply_statistics_reference(statistics, *state_and_options)
    return torch.ops.beitv2_fast_cpu.move_codebook(statistics.contiguous(), *state, decay, metric == "cosine", eps)


@apply_statistics.register_kernel("cuda")
def _(statistics, *state_and_options):
    if not _all_contiguous(state_and_options[:3]):
        return apply_statistics_reference(statistics, *state_and_options)
    from .triton_apply import apply_statistics_triton

    return apply_statistics_triton(statistics.contiguous(), *state_and_options)


def _all_contiguous(state: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in state)
