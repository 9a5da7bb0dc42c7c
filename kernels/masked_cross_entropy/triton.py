"""masked_cross_entropy on NVIDIA and AMD GPUs: the launches of triton_norm and triton_loss.

The products with gradients are cuBLAS's or hipBLASLt's, chunk by chunk (chunked.py says why); fewer chunks are faster,
as each adds to the weight's gradient, and cost memory. In fp32 they use tf32 only if
torch.set_float32_matmul_precision allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..gpu import cdiv, device_of, next_power_of_2, target_name
from .chunked import Device, Head, Normalized, Results, Wanted, empty_results, head_losses
from .triton_backward import scatter_rows_kernel, weigh
from .triton_loss import combine_parts, linear_loss, softmax_gradient, softmax_rows
from .triton_norm import normalize_rows, normalize_rows_backward

CHUNK_BYTES = 1 << 27  # logits in memory at once: a branch of 4,800 tokens and 8192 classes in bf16, half of it in fp32
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
WHOLE_ROW = 1 << 14  # classes of which softmax_rows holds a row in registers; more are read block by block
SOFTMAX_BLOCK, SOFTMAX_WARPS = 1024, 4
NORM_ROWS = 4  # rows of a program of the LayerNorm's backward
SCATTER_ROWS = 4  # tokens of a program of the scatter


def norm_launch(dim: int) -> dict[str, int]:
    block = next_power_of_2(dim)
    return {"BLOCK_C": block, "num_warps": min(max(block // 256, 1), 16)}


def softmax_launch(classes: int, dtype: torch.dtype, target: str) -> dict[str, int]:
    """16 logits per lane. At 64 registers, enough for low-precision vectors, an SM holds two rows of 8192: one is read
    while the other is computed."""
    block = next_power_of_2(classes)
    launch = {"BLOCK_V": block, "num_warps": min(max(block // 512, 1), 8 if target == "gfx942" else 16)}
    bounded = target in ("sm_80", "sm_90") and block <= 8192 and classes % 16 == 0 and dtype in LOW_PRECISION
    return {**launch, "maxnreg": 64} if bounded else launch


def head_losses_triton(
    branches: Sequence[Tensor], positions: Tensor, labels: Tensor, head: Head, dtype: torch.dtype, wanted: Wanted
) -> Results:
    """``head_losses`` by kernels: all branches at once if their logits are one chunk, else branch after branch."""
    count, rows, (classes, dim) = len(branches), len(positions), head.weight.shape
    if dtype == torch.float64 or not rows:
        return head_losses(branches, positions, labels, head, dtype, wanted, Device(CHUNK_BYTES // dtype.itemsize))
    out = empty_results(branches, positions, head, dtype, wanted, zero=False)
    gamma, beta, weight = head.norm_weight.float().contiguous(), head.norm_bias.float().contiguous(), head.weight
    weight = weight.to(dtype).contiguous()
    bias = None if head.bias is None else head.bias.float().contiguous()
    positions, labels = positions.contiguous(), labels.contiguous()
    logits_free = dtype in LOW_PRECISION and not any(wanted)
    whole = classes <= WHOLE_ROW and count * rows * classes * dtype.itemsize <= CHUNK_BYTES
    group, size = (count, rows) if whole and not logits_free else (1, chunk_rows(rows, classes, dtype))
    buffer = weight.new_empty(0 if logits_free else group * size, classes)
    for first in range(0, count, group):
        normalized = normalize_triton(branches[first : first + group], positions, gamma, beta, head.eps, dtype)
        losses, correct = (t[first : first + group].view(-1) for t in (out.losses, out.correct))
        if logits_free:
            loss_triton(normalized.hidden, weight, bias, labels, losses, correct)
            continue
        grad_hidden = torch.empty_like(normalized.hidden) if wanted.tokens or wanted.norm else None
        sums = bias_sums(buffer, group, size) if out.grad_bias.numel() else None
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows)) if group == 1 else slice(0, group * rows)
            hidden = normalized.hidden[chunk]
            logits = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])
            softmax_triton_(
                logits, bias, labels[start : start + size], losses[chunk], correct[chunk], any(wanted), sums, start
            )
            for b, part in enumerate(logits.view(group, -1, classes) if wanted.head else ()):
                product = part.t(), hidden.view(group, -1, dim)[b]
                write_product(out.grad_weight[first + b], *product, add=start > 0)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
        if sums is not None:
            torch.sum(sums, 1, out=out.grad_bias[first : first + group])
        if grad_hidden is not None:
            normalize_backward_triton(
                grad_hidden,
                branches[first : first + group],
                positions,
                normalized,
                gamma,
                out.grad_rows[first : first + group],
                out.grad_norm[first : first + group] if wanted.norm else None,
            )
    return out._replace(losses=out.losses.mean(1), correct=out.correct.sum(1))


def chunk_rows(rows: int, classes: int, dtype: torch.dtype) -> int:
    """Rows of a chunk: chunks of nearly the same size, of whole blocks of 128 rows, of about CHUNK_BYTES at most."""
    chunks = cdiv(rows, max(CHUNK_BYTES // (classes * dtype.itemsize), 128))
    return min(cdiv(cdiv(rows, chunks), 128) * 128, rows)


def write_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a b, or out += a b. Of a low dtype, the product itself sums in fp32 where the library can; else each
    chunk's is rounded."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=float(add), out=out)
    elif sums_in_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, beta=float(add), out_dtype=out.dtype, out=out)
    elif add:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))


@cache
def sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm of this dtype adds to fp32: by trying, as versions, ROCm and the CPU differ."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(a.float(), a, a, out_dtype=torch.float32, out=a.float())
    except (RuntimeError, TypeError):
        return False
    return True


def normalize_triton(
    branches: Sequence[Tensor], positions: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Normalized:
    """``normalize`` in one kernel per branch: hidden [branches * M, C]; mean and rstd [branches * M]."""
    count, rows, (images, patches, dim) = len(branches), len(positions), branches[0].shape
    hidden = weight.new_empty(count * rows, dim, dtype=dtype)
    mean, rstd = weight.new_empty(2, count * rows, dtype=torch.float32)
    with device_of(weight):
        for b, tokens in enumerate(branches):
            at = slice(b * rows, (b + 1) * rows)
            normalize_rows[(rows,)](
                tokens, positions, weight, bias, hidden[at], mean[at], rstd[at], images, patches, dim, eps,
                *tokens.stride(), **norm_launch(dim),
            )  # fmt: skip
    return Normalized(hidden, mean, rstd)


def normalize_backward_triton(
    grad_hidden: Tensor,
    branches: Sequence[Tensor],
    positions: Tensor,
    normalized: Normalized,
    weight: Tensor,
    grad_rows: Sequence[Tensor],
    grad_norm: Tensor | None,
) -> None:
    """``normalize_backward`` of grad_hidden [branches * M, C] in one kernel per branch and a sum over its programs: the
    gradients into grad_rows, branches x [M, C] or none, and grad_norm [branches, 2, C]."""
    count, rows, (images, patches, dim) = len(branches), len(positions), branches[0].shape
    programs = cdiv(rows, NORM_ROWS)
    partial = weight.new_empty(count if grad_norm is not None else 0, programs, 2, dim, dtype=torch.float32)
    with device_of(weight):
        for b, tokens in enumerate(branches):
            at = slice(b * rows, (b + 1) * rows)
            normalize_rows_backward[(programs,)](
                grad_hidden[at], tokens, positions, weight, normalized.mean[at], normalized.rstd[at],
                grad_rows[b] if grad_rows else partial, partial[b] if len(partial) else partial,
                rows, images, patches, dim, *tokens.stride(),
                ROWS=NORM_ROWS, WRITE_ROWS=bool(grad_rows), WRITE_NORM=grad_norm is not None, **norm_launch(dim),
            )  # fmt: skip
    if grad_norm is not None:
        torch.sum(partial, 1, out=grad_norm)


def bias_sums(logits: Tensor, branches: int, rows: int) -> Tensor:
    """[branches, programs, V] for the column sums that each of softmax_triton_'s programs keeps of its rows."""
    classes = logits.shape[1]
    programs = softmax_programs(logits, branches, rows) if classes <= WHOLE_ROW else 1
    return logits.new_empty(branches, programs, classes, dtype=torch.float32)


def softmax_programs(logits: Tensor, branches: int, rows: int) -> int:
    """Per branch: as many as run at once, of 8 rows at least: their column sums stay small beside the logits."""
    resident = (
        processors(logits.device) * 32 // softmax_launch(logits.shape[1], logits.dtype, target_name())["num_warps"]
    )
    return min(cdiv(resident, branches), cdiv(rows, 8))


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def softmax_triton_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    gradient: bool,
    sums: Tensor | None,
    start: int = 0,
) -> None:
    """``softmax_`` in one kernel, of logits [branches * R, V] and labels [R] that all branches share. The gradient's
    column sums are written to ``sums`` (bias_sums), or added to them if these rows are not the first (start > 0)."""
    rows, classes = len(labels), logits.shape[1]
    branches = len(logits) // rows
    pointers = logits, labels if bias is None else bias, labels, losses, correct
    with device_of(logits):
        if classes <= WHOLE_ROW:
            programs = softmax_programs(logits, branches, rows) if sums is None else sums.shape[1]
            softmax_rows[(programs, branches)](
                *pointers, logits if sums is None else sums, rows, classes, start, HAS_BIAS=bias is not None,
                GRADIENT=gradient, SUMS=sums is not None, **softmax_launch(classes, logits.dtype, target_name()),
            )  # fmt: skip
            return
        softmax_gradient[(rows,)](
            *pointers, classes, HAS_BIAS=bias is not None, GRADIENT=gradient, BLOCK_V=SOFTMAX_BLOCK,
            num_warps=SOFTMAX_WARPS,
        )  # fmt: skip
    if sums is not None:
        columns = logits.sum(0, dtype=torch.float32)
        sums[0, 0].add_(columns) if start else sums[0, 0].copy_(columns)


def loss_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, losses: Tensor, correct: Tensor
) -> None:
    """losses and correct [M] of softmax(hidden W^T + bias): no logits in memory, ``parts`` x M x 16 bytes instead."""
    (rows, dim), classes = hidden.shape, len(weight)
    config = LOSS_CONFIGS[target_name()]
    row_blocks, blocks = cdiv(rows, config.block_m), cdiv(classes, config.block_v)
    blocks_of_part = cdiv(blocks, min(max(4 * processors(hidden.device) // row_blocks, 1), blocks))
    parts = cdiv(blocks, blocks_of_part)
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
        combine_parts[(cdiv(rows, 128),)](
            tops, indices, sums, targets, labels, losses, correct, rows, classes, parts, BLOCK_M=128
        )


def weigh_triton(upstream: Tensor, gradient: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """``with_gradient_backward`` of fp32 gradients whose branches are contiguous, in one kernel."""
    out = gradient.new_empty(gradient.shape[1:], dtype=dtype)
    if out.numel():
        with device_of(gradient):
            weigh[(cdiv(out.numel(), 1024),)](
                gradient, upstream, out, len(gradient), out.numel(), 1.0 / max(rows, 1), gradient.stride(0),
                upstream.stride(0), BLOCK=1024,
            )  # fmt: skip
    return out


def scatter_rows_triton(
    rows: Tensor,
    positions: Tensor,
    images: int,
    patches: int,
    factor: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``masked_scatter`` in one kernel that writes rows and zeros alike; of factor * scale * rows, if a factor of one
    element is given, as ``with_gradient_backward``."""
    (count, dim), tokens = rows.shape, images * patches
    out = rows.new_empty(images, patches, dim, dtype=dtype)
    if out.numel():
        with device_of(rows):
            scatter_rows_kernel[(cdiv(tokens, SCATTER_ROWS),)](
                rows.contiguous(), positions.contiguous(), factor, out, count, tokens, dim, scale, count.bit_length(),
                WEIGH=factor is not None, BLOCK_T=SCATTER_ROWS, BLOCK_C=min(next_power_of_2(dim), 1024),
            )  # fmt: skip
    return out
