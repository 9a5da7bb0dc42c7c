"""masked_cross_entropy on NVIDIA and AMD GPUs: the launches of triton_norm and triton_loss.

The products with gradients are cuBLAS's or hipBLASLt's, chunk by chunk (chunked.py says why); 2,048 x 8192 bf16 logits
are 34 MB, within the L2 cache of an H100. In fp32 they use tf32 only if torch.set_float32_matmul_precision allows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..gpu import device_of, target_name
from .chunked import Device, Normalized
from .triton_loss import combine_parts, linear_loss, softmax_gradient
from .triton_norm import normalize_rows, normalize_rows_backward

CHUNK_LOGITS = 1 << 24
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LossConfig:
    """One shape of linear_loss; tests compile every one for its targets."""

    block_m: int
    block_v: int
    block_c: int
    num_warps: int
    num_stages: int


LOSS_CONFIGS = {
    "sm_80": LossConfig(128, 128, 64, 8, 3),
    "sm_90": LossConfig(128, 128, 64, 8, 3),
    "sm_100": LossConfig(128, 128, 64, 8, 3),
    "gfx942": LossConfig(128, 128, 64, 8, 2),
    "interpreter": LossConfig(32, 64, 16, 4, 1),
}
SOFTMAX_BLOCK, SOFTMAX_WARPS = 1024, 4
NORM_ROWS = 8  # rows of a program of the LayerNorm's backward


def device_for(dtype: torch.dtype) -> Device:
    """The steps on a GPU for products of ``dtype``: fp64 has the plain ones, low precision a loss without logits."""
    if dtype == torch.float64:
        return Device(CHUNK_LOGITS)
    loss = loss_triton if dtype in LOW_PRECISION else None
    return Device(CHUNK_LOGITS, softmax_triton_, normalize_triton, normalize_backward_triton, loss=loss)


def norm_launch(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK_C": block, "num_warps": min(max(block // 256, 1), 16)}


def normalize_triton(
    tokens: Tensor, positions: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Normalized:
    """``normalize`` in one kernel."""
    rows, (images, patches, dim) = len(positions), tokens.shape
    hidden = tokens.new_empty(rows, dim, dtype=dtype)
    mean, rstd = (tokens.new_empty(rows, dtype=torch.float32) for _ in range(2))
    with device_of(tokens):
        normalize_rows[(rows,)](
            tokens, positions, weight.contiguous(), bias.contiguous(), hidden, mean, rstd, images, patches, dim, eps,
            *tokens.stride(), **norm_launch(dim),
        )  # fmt: skip
    return Normalized(hidden, mean, rstd)


def normalize_backward_triton(
    grad_hidden: Tensor,
    tokens: Tensor,
    positions: Tensor,
    normalized: Normalized,
    weight: Tensor,
    grad_rows: Tensor | None,
    grad_norm: Tensor | None,
) -> None:
    """``normalize_backward`` in one kernel and a sum over its programs."""
    rows, (images, patches, dim) = len(positions), tokens.shape
    programs = triton.cdiv(rows, NORM_ROWS)
    wanted = grad_norm is not None
    partial = tokens.new_empty((programs, 2, dim) if wanted else 0, dtype=torch.float32)
    with device_of(tokens):
        normalize_rows_backward[(programs,)](
            grad_hidden, tokens, positions, weight.contiguous(), normalized.mean, normalized.rstd,
            partial if grad_rows is None else grad_rows, partial, rows, images, patches, dim, *tokens.stride(),
            ROWS=NORM_ROWS, WRITE_ROWS=grad_rows is not None, WRITE_NORM=wanted, **norm_launch(dim),
        )  # fmt: skip
    if grad_norm is not None:
        grad_norm += partial.sum(0)


def softmax_triton_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    gradient: bool,
    grad_bias: Tensor | None,
) -> None:
    """``softmax_`` in one kernel, and the column sums of what it wrote."""
    rows, classes = logits.shape
    with device_of(logits):
        softmax_gradient[(rows,)](
            logits, labels if bias is None else bias.contiguous(), labels, losses, correct, classes,
            HAS_BIAS=bias is not None, GRADIENT=gradient,
            BLOCK_V=min(SOFTMAX_BLOCK, triton.next_power_of_2(classes)), num_warps=SOFTMAX_WARPS,
        )  # fmt: skip
    if gradient and grad_bias is not None:
        grad_bias += logits.sum(0, dtype=torch.float32)


def loss_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, losses: Tensor, correct: Tensor
) -> None:
    """losses and correct [M] of softmax(hidden W^T + bias): no logits in memory, ``parts`` x M x 16 bytes instead."""
    (rows, dim), classes = hidden.shape, len(weight)
    config = LOSS_CONFIGS[target_name()]
    row_blocks, blocks = triton.cdiv(rows, config.block_m), triton.cdiv(classes, config.block_v)
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 2
    blocks_of_part = triton.cdiv(blocks, min(max(4 * processors // row_blocks, 1), blocks))
    parts = triton.cdiv(blocks, blocks_of_part)
    tops, sums, targets = (hidden.new_empty(parts, rows, dtype=torch.float32) for _ in range(3))
    indices = hidden.new_empty(parts, rows, dtype=torch.int32)
    with device_of(hidden):
        linear_loss[(row_blocks * parts,)](
            hidden, weight.contiguous(), labels if bias is None else bias.contiguous(), labels,
            tops, indices, sums, targets, rows, classes, dim, parts, blocks_of_part,
            HAS_BIAS=bias is not None, EVEN_C=dim % config.block_c == 0,
            BLOCK_M=config.block_m, BLOCK_V=config.block_v, BLOCK_C=config.block_c,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        combine_parts[(triton.cdiv(rows, 128),)](
            tops, indices, sums, targets, labels, losses, correct, rows, classes, parts, BLOCK_M=128
        )
