"""Argument checks that several ops share: each failure says what was given, what was expected and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("cosine", "euclidean")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")


def check_temperature(op: str, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be positive; got {temperature}. codebook_search is its limit 0.")


def check_vectors(op: str, x: Tensor, codebook: Tensor, *, several: bool = False) -> None:
    """x is [N, D], codebook is [K, D] with K >= 1 and D >= 1, both floating point and on one device; if ``several``,
    the codebook may also be [G, K, D] with N a multiple of G >= 1."""
    if x.dim() != 2 or codebook.dim() not in ((2, 3) if several else (2,)) or x.shape[1] != codebook.shape[-1]:
        raise ValueError(
            f"{op}: x must be [N, D] and codebook [K, D]{' or [G, K, D]' if several else ''} with the same D; "
            f"got x {tuple(x.shape)} and codebook {tuple(codebook.shape)}. Flatten leading dimensions with "
            "x.reshape(-1, x.shape[-1])."
        )
    if min(codebook.shape) < 1:
        raise ValueError(f"{op}: the codebook must hold at least one code of width >= 1; got {tuple(codebook.shape)}")
    if codebook.dim() == 3 and x.shape[0] % codebook.shape[0]:
        raise ValueError(
            f"{op}: {codebook.shape[0]} codebooks take turns, so the rows of x must be a multiple; got {x.shape[0]}"
        )
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be floating point; got {tensor.dtype}. Cast it with .float().")
    if x.device != codebook.device:
        raise ValueError(f"{op}: x is on {x.device}, the codebook on {codebook.device}; move one of them.")


def check_indices(op: str, indices: Tensor, count: int) -> None:
    if indices.dtype != torch.int64 or indices.shape != (count,):
        raise ValueError(
            f"{op}: indices must be int64 of shape [{count}]; got {indices.dtype} of shape {list(indices.shape)}"
        )


def check_range(op: str, indices: Tensor, num_codes: int) -> None:
    """On a GPU it would make the host wait."""
    if len(indices) and (indices.min() < -1 or indices.max() >= num_codes):
        raise IndexError(
            f"{op}: indices must lie in 0..{num_codes - 1}, or be -1 for vectors not to be counted; "
            f"got {indices.min().item()}..{indices.max().item()}"
        )
