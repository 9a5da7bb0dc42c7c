"""``python -m bench.gpu.kernel_cache``: Triton kernels of the default problems, compiled for a GPU that is not here.

A GPU machine then finds them in TRITON_CACHE_DIR, if its Triton is the same build, and starts to measure at once. The
package's own host code runs on CPU tensors, as in the tests: each kernel is compiled as for a launch, and not launched.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.aot import TARGETS
from bench.gpu import tune
from tests.support.launches import launching

Case = tuple[str, Callable[[], object]]

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # of A100, H100, B200, MI300X


def search_cases(processors: int) -> Iterator[Case]:
    from beitv2_fast.kernels.codebook_search import triton as host

    n, k = 12_544, 8192
    for dtype in (torch.float32, torch.bfloat16):
        for d in (32, 8, 64, 256):
            x, codebook = torch.zeros(n, d, dtype=dtype), torch.zeros(k, d)
            blocks = -(-k // host.BLOCK_K)
            plan = host.PLANS[host.target_name()]
            split = host.choose_split(-(-n // plan.configs_for(d)[0].block_n), blocks, processors)
            for outputs in ((True, True, True), (False, False, False)):
                call = partial(host.codebook_search_triton, x, codebook, "cosine", *outputs, split=split)
                yield f"search {dtype} D={d} {outputs[0]}", call
            yield f"4 nearest {dtype} D={d}", partial(host.nearest_codes_triton, x, codebook, "euclidean", 4)
    keys = torch.zeros(n, dtype=torch.int64)
    for metric in ("cosine", "euclidean"):
        yield f"draw {metric}", partial(host.draw_codes_triton, x.float(), codebook, metric, 1.0, keys)


def quantizer_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.codebook_update.triton import (
        apply_statistics_triton,
        codebook_statistics_triton,
        count_uses_triton,
    )
    from beitv2_fast.kernels.vector_quantize.triton import vector_quantize_backward_triton

    n, k, d = 12_544, 8192, 32
    x, codebook = torch.zeros(n, d), torch.zeros(k, d)
    statistics, sizes = torch.zeros(k, 1 + d, dtype=torch.int64), torch.zeros(k)
    indices = torch.zeros(n, dtype=torch.int64)
    yield "statistics", partial(codebook_statistics_triton, x, indices, k, "cosine")
    yield "apply", partial(apply_statistics_triton, statistics, codebook, sizes, None, 0.99, "cosine", 1e-5)
    counts = torch.zeros(3, k, dtype=torch.int64)
    yield "counts", partial(count_uses_triton, *counts, torch.zeros((), dtype=torch.int64))
    for loss in (torch.ones(()), None):
        backward = partial(
            vector_quantize_backward_triton, x, torch.zeros(n, d), torch.zeros(n, d), loss, 1.0, "cosine"
        )
        yield f"vector_quantize backward, loss {loss is not None}", backward


def head_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.masked_cross_entropy import triton as host
    from beitv2_fast.kernels.masked_cross_entropy.chunked import Head, Wanted

    # Of images a quarter: a kernel is the same for every multiple of 16, and the products run here on the CPU.
    images, patches, masked, width, vocabulary = 16, 196, 75, 768, 8192
    positions = torch.arange(images * masked)
    labels = torch.zeros(images * masked, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        tokens = [torch.zeros(images, 1 + patches, width)[:, 1:] for _ in range(2)]
        head = Head(
            torch.zeros(width),
            torch.zeros(width),
            1e-6,
            torch.zeros(vocabulary, width).to(dtype),
            torch.zeros(vocabulary),
        )
        for gradients in (True, False):
            wanted = Wanted(gradients, gradients, gradients)
            call = partial(host.head_losses_triton, tokens, positions, labels, head, dtype, wanted)
            yield f"head {dtype}, gradients {gradients}", call


def attention_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.attention import triton as host

    # The kernels are the same for any number of images. Base at 224, large at 384, and what learns in minutes.
    for tokens, heads, width in (197, 12, 64), (577, 16, 64), (65, 6, 64):
        qkv, grad = (torch.zeros(2, tokens, *shape).bfloat16() for shape in ((3, heads, width), (heads, width)))
        lse, table = torch.zeros(2, heads, tokens), torch.zeros(heads, tokens, tokens)
        for bias, of_bias in ((table, True), (table, False), (None, False)):
            given, name = (qkv, bias, width**-0.5), f"N={tokens}, bias {bias is not None}"
            yield f"attention {name}", partial(host.attention_triton, *given)
            backward = partial(host.attention_backward_triton, grad, *given[:2], grad, lse, given[2], of_bias)
            yield f"attention backward {name}, its gradient {of_bias}", backward


def gradient_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.masked_cross_entropy import triton as host

    images, patches, masked, width, vocabulary = 64, 196, 75, 768, 8192
    rows, upstream, fp32 = torch.zeros(images * masked, width), torch.ones(2), torch.float32
    scatter = partial(host.scatter_rows_triton, rows, torch.arange(images * masked), images, patches)
    yield "masked scatter", scatter
    for factor in upstream.split(1):
        yield "masked scatter of known gradients", partial(scatter, factor, 0.1, fp32)
    for given in (upstream, upstream[:1].expand(2)):
        known = torch.zeros(2, vocabulary * (width + 1) + 2 * width)
        yield "known gradients of parameters", partial(host.weigh_triton, given, known, 7, fp32)


def residual_norm_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.residual_norm import triton as host

    fp32, bf16 = torch.float32, torch.bfloat16
    for width in (384, 768, 1024):
        x, row, keep = torch.zeros(2, 17, width), torch.zeros(width), torch.zeros(2)
        narrow, statistics = x.to(bf16), torch.zeros(34)
        # The three calls of a block with layer scale, with and without drop path, and those of one without.
        calls = [
            (None, None, None, row),
            *((narrow, g, k, n) for g in (row, None) for k in (keep, None) for n in (row, None)),
        ]
        for branch, gamma, kept, norm in calls:
            name = f"residual_norm C={width} gamma={gamma is not None} keep={kept is not None} norm={norm is not None}"
            forward = (x, branch, gamma, kept, 0.9, norm, norm, 1e-6, fp32, bf16)
            yield f"{name}, forward", partial(host.residual_norm_triton, *forward)
            normed = (None,) * 4 if norm is None else (narrow, x, statistics, statistics)
            backward = (x, *normed, branch, gamma, kept, 0.9, norm, fp32, None if branch is None else bf16)
            yield f"{name}, backward", partial(host.residual_norm_backward_triton, *backward)


def gelu_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.gelu.triton import gelu_and_gradient_triton

    x = torch.zeros(2, 1536, dtype=torch.bfloat16)
    yield "gelu_and_gradient", partial(gelu_and_gradient_triton, x, x)


def mask_cases() -> Iterator[Case]:
    from beitv2_fast.kernels.block_masks.triton import block_masks_triton

    keys = torch.zeros(256, dtype=torch.int64)
    for side, masked in ((8, 26), (14, 75)):
        yield f"block_masks {side}x{side}", partial(block_masks_triton, keys, side, side, masked, 4, 0.3, masked)


def tune_cases(processors: int) -> Iterator[Case]:
    from beitv2_fast.kernels.codebook_search import triton as host

    def compile_as(call: Callable[[], object], patches: tune.Patches) -> None:
        with tune.patched([(host, "choose_split", lambda *sizes: split(*sizes[:2], processors)), *patches]):
            call()

    split = host.choose_split
    for each in tune.tunings(torch.device("cpu")):
        for shape, patches in each.candidates.items():
            yield f"{each.kernel}: {shape}", partial(compile_as, each.call, patches)


PARTS = (
    quantizer_cases, head_cases, gradient_cases, attention_cases, residual_norm_cases, gelu_cases, mask_cases,
)  # fmt: skip


def cases(target: str, each: int | None) -> list[Case]:
    """Of each part so many; None: all."""
    with launching(target):  # the host code asks for the target here, too
        parts = (search_cases(PROCESSORS[target]), *(part() for part in PARTS))
        if target == tune.TARGET:
            parts = (*parts, tune_cases(PROCESSORS[target]))
        return [case for part in parts for case in itertools.islice(part, each)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--tiny", action="store_true", help="two cases of each part")
    options = parser.parse_args()
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("set TRITON_CACHE_DIR to the folder that is to be filled")
    failed = 0
    for name, call in cases(options.target, 2 if options.tiny else None):
        started = time.perf_counter()
        try:
            with launching(options.target):
                call()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error)[-200:]}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
