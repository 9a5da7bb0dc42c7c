"""The Triton kernels of the package as they are launched, one ``Case`` each: compiled by tests and by ``gpu_model``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.aot import Binary, compile_kernel

TRITON_TYPE = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}


@dataclass(frozen=True)
class Case:
    """A kernel with the arguments it is compiled for and, for the model, the work of one launch."""

    op: str
    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    tensor_core: bool = False  # the precision allows it, so the binary must use it
    programs: int = 0
    steps: float = 0.0  # iterations of the hot loop in one program
    units: float = 0.0  # scores (or elements) that one iteration of one program handles
    flops: float = 0.0
    read: float = 0.0  # bytes from memory, each counted once
    written: float = 0.0
    l2: float = 0.0  # bytes that all programs together pull through L2
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
    from beitv2_fast.kernels.codebook_search import triton_kernel as host
    from beitv2_fast.kernels.codebook_search import triton_resolve, triton_screen

    plan, size, x_type = host.PLANS[target], 4 if dtype == "fp32" else 2, TRITON_TYPE[dtype]
    num_blocks = -(-k // host.BLOCK_K)
    split = host.choose_split(-(-n // plan.configs_for(d)[0].block_n), num_blocks, processors)
    bits, euclidean = host.index_bits(num_blocks, split), metric == "euclidean"
    block_d, num_d = host.screen_chunks(d)
    row_block_d, row_num_d = host.row_chunks(d)
    packed_bytes, key_bytes = 2 * num_blocks * host.BLOCK_K * block_d * num_d, 4 * n * split * (2 * plan.lanes + 1)
    common = {"EUCLIDEAN": euclidean, "POSITIVE": plan.positive, "INDEX_BITS": bits, "SPLIT": split}
    common |= {"LANES": plan.lanes, "BLOCK_K": host.BLOCK_K}
    codebook_types = {"codebook": "*fp32", "bounds": "*fp32", "K": "i32", "D": "i32", "stride_k": "i32"}
    rows = {"stride_d": 1, "BLOCK_R": host.PACK_ROWS, "BLOCK_D": block_d, "NUM_D": num_d}
    aligned = ("D", "K", "stride_k", "x_stride_n", "codebook_stride_k")
    pack = {"num_warps": 4, "programs": num_blocks * host.BLOCK_K // host.PACK_ROWS, "steps": num_d, "aligned": aligned}
    yield Case(
        "codebook_search", "codebook_magnitude", triton_screen.codebook_magnitude, codebook_types, rows,
        **pack, units=host.PACK_ROWS * block_d, flops=k * d, read=4 * k * d,
    )  # fmt: skip
    yield Case(
        "codebook_search", "pack_codebook", triton_screen.pack_codebook,
        {**codebook_types, "packed": "*fp16", "bias": "*fp32"},
        {**rows, "LANES": plan.lanes, "BLOCK_K": host.BLOCK_K},
        **pack, units=host.PACK_ROWS * block_d, flops=5 * k * d, read=4 * k * d, written=packed_bytes + 4 * k,
    )  # fmt: skip
    for config in plan.configs_for(d):
        programs = -(-n // config.block_n) * split
        yield Case(
            "codebook_search", f"screen {config.block_n}x{host.BLOCK_K}", triton_screen.screen,
            {
                "x": x_type, "packed": "*fp16", "bias": "*fp32", "bounds": "*fp32", "keys": "*fp32", "rest": "*fp32",
                "N": "i32", "D": "i32", "num_blocks": "i32", "x_stride_n": "i32",
            },
            {**common, "x_stride_d": 1, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "NUM_D": num_d},
            config.num_warps, config.num_stages, aligned, tensor_core=True,
            programs=programs, steps=num_blocks / split * num_d, units=config.block_n * host.BLOCK_K / num_d,
            flops=2 * n * k * d, read=size * n * d + packed_bytes, written=key_bytes,
            l2=programs * (packed_bytes / split + size * config.block_n * d),
        )  # fmt: skip
    candidates = n * host.BLOCK_K // plan.lanes  # one group a row; near ties add a few per cent
    yield Case(
        "codebook_search", "resolve", triton_resolve.resolve,
        {
            "x": x_type, "codebook": "*fp32", "bounds": "*fp32", "keys": "*fp32", "rest": "*fp32", "indices": "*i64",
            "normalized": "*fp32", "codes": "*fp32", "distances": "*fp32", "N": "i32", "K": "i32", "D": "i32",
            "num_blocks": "i32", "x_stride_n": "i32", "codebook_stride_k": "i32",
        },
        {
            **common, "x_stride_d": 1, "codebook_stride_d": 1, "WRITE_NORMALIZED": outputs, "WRITE_CODES": outputs,
            "WRITE_DISTANCES": outputs, "BLOCK_R": plan.resolve_rows, "BLOCK_D": row_block_d, "NUM_D": row_num_d,
            "BLOCK_SCAN": host.BLOCK_SCAN,
        },
        4, 3, aligned, programs=-(-n // plan.resolve_rows), steps=1,
        units=plan.resolve_rows * host.BLOCK_K / plan.lanes,
        flops=2 * candidates * d, read=size * n * d + key_bytes + 4 * k * d,
        written=n * (8 + outputs * (8 * d + 4)), l2=candidates * d * 4 + size * n * d + key_bytes,
    )  # fmt: skip


CASES: dict[str, Callable[..., Iterator[Case]]] = {"codebook_search": search_cases}
