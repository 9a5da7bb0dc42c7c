"""Where the tests marked ``gpu`` run, and how near the CPU they have to come.

    python -m pytest -m gpu -n 8                           # on a GPU; without one they are skipped
    BEITV2_FAST_GPU_TESTS=cpu python -m pytest -m gpu      # dry: on the CPU, tiny, all but CUDA's own mechanisms

A dry run shows that the tests themselves run. With TRITON_INTERPRET=1 beside it, it launches the Triton kernels, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

DRY = os.environ.get("BEITV2_FAST_GPU_TESTS") == "cpu"
HERE = "cpu" if DRY else "cuda"  # ROCm answers to the name cuda, too

cuda_only = pytest.mark.skipif(DRY, reason="a mechanism of CUDA: no dry run")
launches = pytest.mark.skipif(
    DRY and os.environ.get("TRITON_INTERPRET") != "1", reason="launches Triton kernels: dry with TRITON_INTERPRET=1"
)

# The norm of the difference to the CPU's fp32 over its norm, for outputs and for each parameter's gradient of a few
# layers. fp32: sums in another order; the CPU's own fp32 is up to 1e-6 from fp64, TF32 would be above 5e-4. bf16 and
# fp16: every operand, activation and gradient is rounded to 8 and 11 bits; the CPU, which rounds fewer of them, loses
# up to 1.4e-2 and 2e-3.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1.5e-2, torch.bfloat16: 6e-2}

T = TypeVar("T")


def pick(full: T, tiny: T) -> T:
    """The size on a GPU, or that of a dry run."""
    return tiny if DRY else full


def device_is_there() -> bool:
    return DRY or torch.cuda.is_available()


def here(value: T) -> T:
    """Tensors, modules, and tuples, lists and dicts of them on the tests' device: copies."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(HERE).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: here(v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(here(v) for v in value)
    return value.to(HERE) if isinstance(value, nn.Module) else value


def distance(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of what is right."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return ((ours - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def autocast(dtype: torch.dtype, device: str = HERE) -> torch.autocast:
    return torch.autocast(device, dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises. A dry run notices nothing."""
    if not DRY:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """fp32 is fp32: neither matrix products nor convolutions use TF32, which cuDNN does by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Only ops that give the same bits every time; any other raises. conftest.py sets what cuBLAS needs for it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
