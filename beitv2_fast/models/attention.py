"""Attention with an additive position bias: one function, the choice of what computes it, and the learned bias.

| implementation | where | why |
|---|---|---|
| native | CPU; NVIDIA GPUs of compute capability 9.x, other GPUs by request | ``kernels.attention``: never holds the \
scores of all images, the same bits every time; fastest where it is chosen (bench/README.md, docs/gpu.md) |
| xformers | other NVIDIA GPUs up to compute capability 9.0 | fused, with a gradient for the bias |
| sdpa | all other devices; anywhere by request | ``F.scaled_dot_product_attention`` |
| math | CPU without compiled ops; anywhere by request | the definition, in plain PyTorch |
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import attention as native_attention
from ..kernels.attention.ops import has_gpu_kernel
from ..kernels.attention.reference import attention_reference
from ..kernels.native import native_ops

IMPLEMENTATIONS = ("auto", "native", "xformers", "sdpa", "math")
XFORMERS_CAPABILITY = (9, 0)  # the newest that its kernel with a learned bias supports
OLDEST_CAPABILITY = (8, 0)  # of those that ours runs on
NATIVE_CAPABILITY = 9  # the major one of the GPUs on which ours was measured: the fastest there
ALIGNED = 8  # its rows of the bias must start at multiples of so many elements


def attend(qkv: Tensor, bias: Tensor | None, implementation: str = "auto") -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v``.

    Args:
        qkv: [B, N, 3, H, d]. bias: [1, H, N, N] from ``prepare_bias``, or None. It may need a gradient.
        implementation: one of ``IMPLEMENTATIONS``; "auto" is resolved by ``choose_attention``. What ``native`` has no
            GPU kernel for (fp32, fp64, heads wider than 128) is left to ``sdpa``.

    Returns:
        [B, N, H * d] in qkv's dtype.
    """
    name = choose_attention(implementation, qkv.device.type)
    if name == "native" and (qkv.device.type == "cpu" or has_gpu_kernel(qkv)):
        return native_attention(qkv, bias).flatten(2)
    if name == "xformers" and not torch.compiler.is_compiling():  # its backward does not compile; sdpa's is the same
        return _xformers(qkv, bias).flatten(2)
    if name == "math":
        return attention_reference(qkv, bias, qkv.shape[-1] ** -0.5)[0].flatten(2)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def prepare_bias(bias: Tensor, implementation: str) -> Tensor:
    """[1, H, N, N] as the implementation reads it, done once per forward for all layers: dtype and alignment.

    ``native`` and ``math`` add it in fp32; the others in the dtype of autocast. xformers' rows are aligned.
    """
    name = choose_attention(implementation, bias.device.type)
    if name in ("native", "math"):
        return bias
    device = bias.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        bias = bias.to(torch.get_autocast_dtype(device))
    if name == "xformers":
        tokens = bias.shape[-1]
        bias = F.pad(bias, (0, -tokens % ALIGNED))[..., :tokens]
    return bias


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """For query i and key j (CLS first) the row of the bias table: [1 + h*w, 1 + h*w] int64.

    Rows 0..(2h-1)(2w-1)-1 are offsets between patches; then CLS to patch, patch to CLS, CLS to CLS.
    """
    h, w = grid
    coords = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)  # [2, h*w]
    offset = coords[:, :, None] - coords[:, None, :]  # [2, h*w, h*w]
    rows = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(h * w + 1, h * w + 1, dtype=torch.int64)
    index[1:, 1:] = (offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1
    index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


class RelativePositionBias(nn.Module):
    """A learned bias per head for every offset between two tokens: [1, H, N, N] with N = 1 + h*w."""

    def __init__(self, grid: tuple[int, int], heads: int, implementation: str):
        super().__init__()
        add_bias_table(self, grid, heads, implementation)

    def forward(self) -> Tensor:
        return position_bias(self)


def add_bias_table(module: Any, grid: tuple[int, int], heads: int, implementation: str) -> None:
    """Give a module the table and its index: the model has one, or every attention its own (after fine-tuning)."""
    h, w = grid
    module.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, heads))
    module.register_buffer("relative_position_index", relative_position_index(grid), persistent=False)
    module.implementation = implementation


def position_bias(module: Any) -> Tensor:
    bias = F.embedding(module.relative_position_index, module.relative_position_bias_table)  # [N, N, H]
    return prepare_bias(bias.permute(2, 0, 1).unsqueeze(0).contiguous(), module.implementation)


def choose_attention(implementation: str, device_type: str) -> str:
    """What computes attention on this type of device; ``UserError`` if what was asked for cannot run here."""
    return _choose(implementation, device_type)


# The mark that torch.compiler.assume_constant_result makes; the decorator itself would import torch._dynamo, which
# takes as long as the rest of the package.
choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]  # mypy knows none of functions


@functools.cache  # once per process: the look at xformers imports it
def _choose(implementation: str, device_type: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if implementation == "auto":
        if device_type == "cpu":
            return "native" if native_ops() else "math"
        if device_type == "cuda" and _native_is_fastest():
            return "native"
        return "xformers" if device_type == "cuda" and _xformers_runs() else "sdpa"
    if implementation == "native" and (problem := native_problem(device_type)):
        raise UserError(f"attention 'native' cannot run here: {problem} Or use auto, sdpa or math.")
    if implementation == "xformers" and (problem := xformers_problem(device_type)):
        raise UserError(f"attention 'xformers' cannot run here: {problem} Or use auto or sdpa.")
    return implementation


choose_attention.cache_clear = _choose.cache_clear  # type: ignore[attr-defined]  # for tests


def native_problem(device_type: str) -> str | None:
    """Why our op has no fast version here, with what to do about it; None if it has."""
    if device_type == "cpu":
        return None if native_ops() else "its C++ version was not compiled, as a warning has said."
    if device_type != "cuda":
        return f"it has no kernel for {device_type}."
    if importlib.util.find_spec("triton") is None:
        return "on a GPU it needs Triton. Install it with: pip install triton."
    if not torch.version.hip and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return f"its kernels need compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}, which this GPU has not."
    return None


def _native_is_fastest() -> bool:
    if torch.version.hip or not torch.cuda.is_available() or native_problem("cuda"):
        return False
    return torch.cuda.get_device_capability()[0] == NATIVE_CAPABILITY


def _xformers_runs() -> bool:
    """Whether xformers can be used; one that is installed but broken is worth a warning, an absent one is not."""
    try:
        import xformers  # noqa: F401
    except ImportError:
        return False
    if problem := xformers_problem("cuda", of_installation=True):
        warnings.warn(f"beitv2_fast: {problem} Until then F.scaled_dot_product_attention runs.", stacklevel=2)
        return False
    return xformers_problem("cuda") is None


def xformers_problem(device_type: str, *, of_installation: bool = False) -> str | None:
    """Why xformers cannot compute attention, with what to do about it; None if it can."""
    if device_type != "cuda":
        return f"it has no kernel for {device_type}."
    try:
        import xformers.ops  # noqa: F401
        from xformers import _cpp_lib
    except ImportError as error:
        return f"it could not be imported ({error}). Install it with: pip install 'beitv2-fast[gpu]'."
    if (failure := _cpp_lib._cpp_library_load_exception) is not None:
        return _cure(failure)
    if of_installation:
        return None
    capability = torch.cuda.get_device_capability()
    if torch.version.hip or capability > XFORMERS_CAPABILITY:
        limit = ".".join(map(str, XFORMERS_CAPABILITY))
        return f"its kernel with a learned bias supports NVIDIA GPUs up to compute capability {limit}, not this one."
    return None


def _cure(failure: Exception) -> str:
    """What to do about a CUDA library of xformers that does not load."""
    cause = str(failure.__cause__ or failure).strip().split("\n")[0]
    if "libcudart" in cause:
        return (
            f"xformers is installed, but its CUDA part misses a library ({cause}): it was built for CUDA 12. Install "
            "that library beside your torch: pip install nvidia-cuda-runtime-cu12."
        )
    return (
        f"xformers is installed, but its CUDA part does not load ({cause}): it was built for another torch or Python "
        f"than torch {torch.__version__}. Install the xformers of your torch's version, and "
        "nvidia-cuda-runtime-cu12 if torch is built for a newer CUDA than 12."
    )


def _xformers(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """memory_efficient_attention: [B, N, H, d] inputs, and the bias expanded over the batch, not broadcast."""
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unbind(2)
    if bias is not None:
        bias = bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias)
    return out
