"""The EMA step of a codebook: its two passes as custom ops, of which the dispatcher picks the version for the tensors'
device, and the exchange between ranks in the middle.

For callers that know their vectors and indices to fit, as the quantizer does; ``codebook_update`` checks them first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_range
from ..codebook_search.reference import numbered
from ..native import native_ops
from ..registration import custom_op
from ..sampling import ALONE, named_group
from .reference import apply_statistics_reference, codebook_statistics_reference

MAX_DIM = 32768  # of the fixed-point squares


def ema_step(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    x: Tensor,
    indices: Tensor,
    decay: float,
    metric: str,
    eps: float,
    group: dist.ProcessGroup | str | None = None,
) -> Tensor:
    """``codebook_update`` without dead codes, in place on its first three arguments; returns bins [K]. Also of several
    codebooks [G, K, D], to which the rows belong in turn; then bins [G, K]."""
    check_state(codebook, cluster_size=cluster_size, embed_avg=embed_avg)
    groups = 1 if codebook.dim() == 2 else codebook.shape[0]
    statistics = codebook_statistics(x, indices, codebook.shape[-2], metric, groups)
    sum_over_ranks(statistics, group)
    bins: Tensor = apply_statistics(statistics, codebook, cluster_size, embed_avg, decay, metric, eps)
    return bins.view(cluster_size.shape)


def check_state(codebook: Tensor, **state: Tensor | None) -> None:
    """Raise if a codebook [..., K, D], or cluster_size, embed_avg or idle beside it, is not what updates write to."""
    if codebook.shape[-1] > MAX_DIM:
        raise ValueError(f"codebook_update: D must be at most {MAX_DIM}; got {codebook.shape[-1]}")
    for name, tensor in (("codebook", codebook), *state.items()):
        if tensor is None:
            continue
        dtype = torch.int64 if name == "idle" else torch.float32
        shape = codebook.shape if name in ("codebook", "embed_avg") else codebook.shape[:-1]
        if tensor.dtype != dtype:
            raise TypeError(
                f"codebook_update: {name} must be {dtype}; got {tensor.dtype}. The steps of a moving average vanish in "
                "a shorter type: keep the buffer as it is when the model is cast."
            )
        if tensor.shape != shape or tensor.device != codebook.device:
            raise ValueError(
                f"codebook_update: {name} must be {list(shape)} on {codebook.device}; "
                f"got {list(tensor.shape)} on {tensor.device}"
            )


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | str | None = None) -> None:
    """In place, if there are several ranks."""
    if group != ALONE and dist.is_available() and dist.is_initialized():
        group = named_group(group)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(tensor, group=group)


@custom_op("beitv2_fast::count_uses", mutates_args=("idle", "window", "steps"))
def count_uses(bins: Tensor, idle: Tensor, window: Tensor | None = None, steps: Tensor | None = None) -> None:
    """A step's bins [..., K] int64, added in place to what is given: idle [..., K], how many vectors were seen since
    each code was last chosen; window [..., K], how often each was chosen; steps []."""
    idle.add_(bins.sum(-1, keepdim=True)).masked_fill_(bins > 0, 0)
    if window is not None:
        window.add_(bins)
    if steps is not None:
        steps.add_(1)


@count_uses.register_fake
def _count_uses_fake(*_: Any) -> None:
    return None


@count_uses.register_kernel("cuda")
def _count_uses_cuda(bins: Tensor, idle: Tensor, window: Tensor | None = None, steps: Tensor | None = None) -> None:
    if _all_contiguous(bins, idle, window):
        from .triton import count_uses_triton

        count_uses_triton(bins, idle, window, steps)
    else:
        count_uses._init_fn(bins, idle, window, steps)


@custom_op("beitv2_fast::codebook_statistics")
def codebook_statistics(x: Tensor, indices: Tensor, num_codes: int, metric: str, groups: int = 1) -> Tensor:
    """Of [K, D] codes; with ``groups`` codebooks, to which the rows belong in turn, of [G K, D]."""
    indices = numbered(indices, groups, num_codes)
    return codebook_statistics_reference(x, indices, groups * num_codes, metric)


@codebook_statistics.register_fake
def _codebook_statistics_fake(x: Tensor, indices: Tensor, num_codes: int, metric: str, groups: int = 1) -> Tensor:
    limbs = 1 if metric == "cosine" else 2
    return x.new_empty(groups * num_codes, 1 + limbs * x.shape[1], dtype=torch.int64)


@codebook_statistics.register_kernel("cpu")
def _codebook_statistics_cpu(x: Tensor, indices: Tensor, num_codes: int, metric: str, groups: int = 1) -> Tensor:
    if native_ops():
        chosen = numbered(indices, groups, num_codes) if groups > 1 else indices
        native = torch.ops.beitv2_fast_cpu.codebook_statistics
        statistics: Tensor = native(x, chosen, groups * num_codes, metric == "cosine")
        return statistics
    check_range("codebook_update", indices, num_codes)
    by_definition: Tensor = codebook_statistics._init_fn(x, indices, num_codes, metric, groups)
    return by_definition


@codebook_statistics.register_kernel("cuda")
def _codebook_statistics_cuda(x: Tensor, indices: Tensor, num_codes: int, metric: str, groups: int = 1) -> Tensor:
    from .triton import codebook_statistics_triton  # only here: the package imports without Triton

    return codebook_statistics_triton(x, indices, num_codes, metric, groups)


@custom_op("beitv2_fast::apply_codebook_statistics", mutates_args=("codebook", "cluster_size", "embed_avg"))
def apply_statistics(
    statistics: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    decay: float,
    metric: str,
    eps: float,
) -> Tensor:
    """The second pass, in place; also for several codebooks [G, K, D] with the statistics of [G K, D]. Returns bins."""
    return _apply_to_each(apply_statistics_reference, statistics, codebook, cluster_size, embed_avg, decay, metric, eps)


def of_each(codebook: Tensor, *state: Tensor | None) -> list[list[Any]]:
    """What several codebooks [G, K, D] have in [G, ...], or one [K, D] without G -> that of each."""
    if codebook.dim() == 2:
        return [[codebook, *state]]
    return [[None if t is None else t[g] for t in (codebook, *state)] for g in range(codebook.shape[0])]


def _apply_to_each(apply: Callable[..., Tensor], statistics: Tensor, *state_and_options: Any) -> Tensor:
    """``apply``, which knows one codebook."""
    codebook, cluster_size, embed_avg, *options = state_and_options
    parts = of_each(codebook, statistics.unflatten(0, cluster_size.shape), cluster_size, embed_avg)
    bins = [apply(own, codes, *averages, *options) for codes, own, *averages in parts]
    return bins[0] if len(bins) == 1 else torch.cat(bins)


@apply_statistics.register_fake
def _apply_statistics_fake(statistics: Tensor, *_: Any) -> Tensor:
    return statistics.new_empty(statistics.shape[0])


@apply_statistics.register_kernel("cpu")
def _apply_statistics_cpu(statistics: Tensor, *state_and_options: Any) -> Tensor:
    codebook, cluster_size, embed_avg, decay, metric, eps = state_and_options
    if not native_ops() or not _all_contiguous(codebook, cluster_size, embed_avg):
        return _apply_to_each(apply_statistics_reference, statistics, *state_and_options)
    if embed_avg is None:  # a code moves by itself
        codebook, cluster_size = codebook.flatten(0, -2), cluster_size.flatten()
    move, options = torch.ops.beitv2_fast_cpu.move_codebook, (decay, metric == "cosine", eps)
    return _apply_to_each(move, statistics.contiguous(), codebook, cluster_size, embed_avg, *options)


@apply_statistics.register_kernel("cuda")
def _apply_statistics_cuda(statistics: Tensor, *state_and_options: Any) -> Tensor:
    if not _all_contiguous(*state_and_options[:3]):
        return _apply_to_each(apply_statistics_reference, statistics, *state_and_options)
    from .triton import apply_statistics_triton

    return apply_statistics_triton(statistics.contiguous(), *state_and_options)


def _all_contiguous(*state: Tensor | None) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in state)
