"""The Triton kernels of the package as they are launched, one ``Case`` each: compiled ahead of time by tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.aot import Binary, compile_kernel

TRITON_TYPE = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}


@dataclass(frozen=True)
class Case:
    """A kernel with the arguments it is compiled for."""

    op: str
    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    tensor_core: bool = False  # the precision allows it, so the binary must use it
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self, target: str) -> Binary:
        return compile_kernel(
            self.kernel, self.signature, self.constexprs, target, num_warps=self.num_warps,
            num_stages=self.num_stages, aligned=self.aligned, **self.options,
        )  # fmt: skip


def search_cases(
    target: str,
    *,
    n: int = 12_544,
    k: int = 8192,
    d: int = 32,
    dtype: str = "fp32",
    metric: str = "cosine",
    processors: int = 132,
    outputs: bool = True,
) -> Iterator[Case]:
    """codebook_search: the kernels of one call; the screening once for every configuration autotuning may pick."""
    from beitv2_fast.kernels.codebook_search import triton as host
    from beitv2_fast.kernels.codebook_search import triton_nearest, triton_resolve, triton_scan, triton_screen

    plan, x_type = host.PLANS[target], TRITON_TYPE[dtype]
    num_blocks = -(-k // host.BLOCK_K)
    split = host.choose_split(-(-n // plan.configs_for(d)[0].block_n), num_blocks, processors)
    bits, euclidean = host.index_bits(num_blocks, split), metric == "euclidean"
    block_d, num_d = host.screen_chunks(d)
    row_block_d, row_num_d = host.row_chunks(d)
    pack_d = host.pack_chunk(block_d * num_d)
    common = {"EUCLIDEAN": euclidean, "POSITIVE": plan.positive, "INDEX_BITS": bits, "SPLIT": split}
    common |= {"LANES": plan.lanes, "BLOCK_K": host.BLOCK_K, "groups": 1}
    aligned = ("N", "D", "K", "num_blocks", "stride_k", "x_stride_n", "codebook_stride_k", "part_size")
    screened = {"center": "*fp32", "bounds": "*fp32", "N": "i32", "D": "i32", "num_blocks": "i32"}
    yield Case(
        "codebook_search", "pack_codebook", triton_screen.pack_codebook,
        {
            **screened, "codebook": "*fp32", "packed": "*fp16", "bias": "*fp32", "hard": "*i64", "K": "i32",
            "stride_k": "i32",
        },
        {
            "stride_d": 1, "LANES": plan.lanes, "BLOCK_K": host.BLOCK_K, "SAMPLE": host.SAMPLE, "EUCLIDEAN": euclidean,
            "groups": 1, "BLOCK_D": pack_d, "NUM_D": block_d * num_d // pack_d,
        },
        host.PACK_WARPS, 3, aligned,
    )  # fmt: skip
    for config in plan.configs_for(d):
        yield Case(
            "codebook_search", f"screen {config.block_n}x{host.BLOCK_K}", triton_screen.screen,
            {
                **screened, "x": x_type, "packed": "*fp16", "bias": "*fp32", "keys": "*fp32", "rest": "*fp32",
                "x_stride_n": "i32",
            },
            {**common, "x_stride_d": 1, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "NUM_D": num_d},
            config.num_warps, config.num_stages, aligned, tensor_core=True,
        )  # fmt: skip
    rows = {
        "x": x_type, "codebook": "*fp32", "hard": "*i64", "indices": "*i64", "normalized": "*fp32", "codes": "*fp32",
        "distances": "*fp32", "N": "i32", "K": "i32", "D": "i32", "x_stride_n": "i32", "codebook_stride_k": "i32",
    }  # fmt: skip
    wanted = {
        "EUCLIDEAN": euclidean, "groups": 1, "x_stride_d": 1, "codebook_stride_d": 1, "WRITE_NORMALIZED": outputs,
        "WRITE_CODES": outputs, "WRITE_DISTANCES": outputs, "BLOCK_D": row_block_d, "NUM_D": row_num_d,
    }  # fmt: skip
    yield Case(
        "codebook_search", "resolve", triton_resolve.resolve,
        {**screened, **rows, "keys": "*fp32", "rest": "*fp32"},
        {**common, **wanted, "BLOCK_R": plan.resolve_rows},
        4, 3, aligned, options=plan.resolve_options,
    )  # fmt: skip
    yield Case(
        "codebook_search", "scan", triton_scan.scan, {**rows, "x": "*fp32", "partial": "*fp64", "part_size": "i32"},
        {
            **wanted, "PARTS": host.scan_parts(k, split), "BLOCK_R": plan.scan_rows, "BLOCK_C": host.BLOCK_SCAN,
        },
        host.SCAN_WARPS, 3, aligned, tensor_core=True,
    )  # fmt: skip
    yield Case(
        "codebook_search", "draw", triton_scan.draw,
        {
            "x": "*fp32", "codebook": "*fp32", "keys": "*i64", "indices": "*i64", "N": "i32", "K": "i32", "D": "i32",
            "temperature": "i64", "x_stride_n": "i32", "codebook_stride_k": "i32",
        },
        {
            "EUCLIDEAN": euclidean, "groups": 1, "x_stride_d": 1, "codebook_stride_d": 1, "BLOCK_R": plan.scan_rows,
            "BLOCK_C": host.BLOCK_SCAN, "BLOCK_D": row_block_d, "NUM_D": row_num_d,
        },
        host.SCAN_WARPS, 3, aligned, tensor_core=True, options=plan.resolve_options,
    )  # fmt: skip
    yield Case(
        "codebook_search", "4 nearest", triton_nearest.nearest,
        {name: kind for name, kind in rows.items() if name not in ("hard", "normalized", "codes", "distances")}
        | {"x": "*fp32"},
        {
            **{name: value for name, value in wanted.items() if "WRITE" not in name}, "TOP": 4, "SLOTS": 4,
            "BLOCK_R": plan.scan_rows, "BLOCK_C": host.BLOCK_SCAN,
        },
        host.SCAN_WARPS, 3, aligned, tensor_core=True, options=plan.resolve_options,
    )  # fmt: skip


def head_cases(target: str, *, c: int = 768) -> Iterator[Case]:
    """masked_cross_entropy in bf16: the loss alone, then the kernels around the library's products with gradients."""
    from beitv2_fast.kernels.masked_cross_entropy import triton as host
    from beitv2_fast.kernels.masked_cross_entropy import triton_loss, triton_norm

    config, norm = host.LOSS_CONFIGS[target], host.norm_launch(c)
    row = host.softmax_launch(8192, torch.bfloat16, target)
    labels = {"labels": "*i64", "losses": "*fp32", "correct": "*i1", "V": "i32"}
    rows = {"tokens": "*bf16", "positions": "*i64", "weight": "*fp32", "means": "*fp32", "rstds": "*fp32"}
    rows |= {"images": "i32", "patches": "i32", "C": "i32", "stride_b": "i64", "stride_n": "i32"}
    columns, aligned = {"stride_c": 1, "BLOCK_C": norm["BLOCK_C"]}, ("M", "V", "C", "stride_b", "stride_n")
    op, warps = "masked_cross_entropy", norm["num_warps"]
    yield Case(
        op, "linear_loss (no gradient)", triton_loss.linear_loss,
        {
            "hidden": "*bf16", "weight": "*bf16", "bias": "*fp32", "labels": "*i64", "tops": "*fp32",
            "indices": "*i32", "sums": "*fp32", "targets": "*fp32", "M": "i32", "V": "i32", "C": "i32",
            "parts": "i32", "blocks_of_part": "i32",
        },
        {"HAS_BIAS": True, "EVEN_C": c % config.block_c == 0, "BLOCK_M": config.block_m, "BLOCK_V": config.block_v,
         "BLOCK_C": config.block_c},
        config.num_warps, config.num_stages, aligned, tensor_core=True,
    )  # fmt: skip
    yield Case(
        op, "normalize_rows", triton_norm.normalize_rows, {**rows, "bias": "*fp32", "hidden": "*bf16", "eps": "fp32"},
        columns, warps, 3, aligned,
    )  # fmt: skip
    yield Case(
        op, "softmax_rows", triton_loss.softmax_rows,
        {**labels, "logits": "*bf16", "bias": "*fp32", "sums": "*fp32", "R": "i32", "start": "i32"},
        {"HAS_BIAS": True, "GRADIENT": True, "SUMS": True, "BLOCK_V": row.pop("BLOCK_V")}, row.pop("num_warps"), 3,
        aligned, options=row,
    )  # fmt: skip
    yield Case(
        op, "softmax_gradient", triton_loss.softmax_gradient, {**labels, "logits": "*bf16", "bias": "*fp32"},
        {"HAS_BIAS": True, "GRADIENT": True, "BLOCK_V": host.SOFTMAX_BLOCK}, host.SOFTMAX_WARPS, 3, aligned,
    )  # fmt: skip
    yield Case(
        op, "normalize_rows_backward", triton_norm.normalize_rows_backward,
        {**rows, "grad_hidden": "*bf16", "grad_rows": "*fp32", "partial": "*fp32", "rows": "i32"},
        {**columns, "ROWS": host.NORM_ROWS, "WRITE_ROWS": True, "WRITE_NORM": True}, warps, 3, aligned,
    )  # fmt: skip


def residual_norm_cases(*, c: int = 768) -> Iterator[Case]:
    """residual_norm as a student's block has it: stream in fp32, branch and norm in bf16, layer scale, drop path."""
    from beitv2_fast.kernels.residual_norm import triton_rows
    from beitv2_fast.kernels.residual_norm.triton import backward_launch, forward_launch

    op, flags, aligned = (
        "residual_norm",
        dict.fromkeys(("HAS_BRANCH", "HAS_GAMMA", "HAS_KEEP", "HAS_NORM"), True),
        ("C",),
    )
    given = dict.fromkeys(("gamma", "keep", "weight", "means", "rstds", "total"), "*fp32") | {"branch": "*bf16"}
    given |= {"C": "i32", "rows_per_image": "i32", "inverse_keep_rate": "fp32"}
    forward, backward = forward_launch(c), backward_launch(c)
    yield Case(
        op, "residual_norm_rows", triton_rows.residual_norm_rows,
        {**given, "x": "*fp32", "bias": "*fp32", "norm": "*bf16", "eps": "fp32"},
        {**flags, "BLOCK_C": forward["BLOCK_C"]}, forward["num_warps"], 3, aligned,
    )  # fmt: skip
    gradients = {"grad_sum": "*fp32", "grad_norm": "*bf16", "grad_x": "*fp32", "grad_branch": "*bf16"}
    yield Case(
        op, "residual_norm_rows_backward", triton_rows.residual_norm_rows_backward,
        {**given, **gradients, "partial": "*fp32", "rows": "i32", "rows_per_program": "i32"},
        {**flags, "HAS_SUM": True, "BLOCK_R": backward["BLOCK_R"], "BLOCK_C": backward["BLOCK_C"]},
        backward["num_warps"], 3, aligned,
    )  # fmt: skip


def update_cases(target: str, *, d: int = 32) -> Iterator[Case]:
    """codebook_update (cosine, as the tokenizer uses it) and the backward of vector_quantize, in fp32."""
    from beitv2_fast.kernels.codebook_update.triton import APPLY_TILE, tile_shape
    from beitv2_fast.kernels.codebook_update.triton_apply import codes_kernel
    from beitv2_fast.kernels.codebook_update.triton_statistics import statistics_kernel
    from beitv2_fast.kernels.vector_quantize.triton_backward import backward_kernel

    (block_n, block_d), (block_k, _) = tile_shape(d), tile_shape(d, APPLY_TILE)
    yield Case(
        "codebook_update", "statistics", statistics_kernel,
        {"x": "*fp32", "indices": "*i64", "out": "*i64", "N": "i32", "K": "i32", "stride_n": "i32"},
        {"groups": 1, "stride_d": 1, "stride_i": 1, "D": d, "COSINE": True, "BLOCK_N": block_n, "BLOCK_D": block_d},
        4, 3, ("stride_n",),
    )  # fmt: skip
    state = {"codebook": "*fp32", "cluster_size": "*fp32"}
    yield Case(
        "codebook_update", "codes", codes_kernel,
        {**state, "statistics": "*i64", "bins": "*i64", "K": "i32", "decay": "fp32", "rest": "fp32", "eps": "fp32"},
        {"totals": None, "embed_avg": None, "D": d, "COSINE": True, "AVERAGE": False, "BLOCK_K": block_k,
         "BLOCK_D": block_d},
        2 if target == "gfx942" else 4, 3,
    )  # fmt: skip
    yield Case(
        "vector_quantize", "backward", backward_kernel,
        {"x": "*fp32", "quantized": "*fp32", "grad": "*fp32", "grad_loss": "*fp32", "out": "*fp32", "N": "i32",
         "weight": "fp32", "stride_xn": "i32", "stride_gn": "i32"},
        {"stride_xd": 1, "stride_gd": 1, "D": d, "COSINE": True, "HAS_GRAD": True, "HAS_LOSS": True,
         "BLOCK_N": block_n, "BLOCK_D": block_d},
        4, 3, ("stride_xn", "stride_gn"),
    )  # fmt: skip
