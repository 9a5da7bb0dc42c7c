"""The Triton kernels of codebook_search as they are launched, one ``Case`` each: compiled ahead of time by tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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
    common = {"EUCLIDEAN": euclidean, "INDEX_BITS": bits, "SPLIT": split}
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
        host.PACK_WARPS, 3, aligned, options=plan.resolve_options,
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
        1, 3, aligned, options=plan.resolve_options,
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
