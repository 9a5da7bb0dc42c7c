"""Section env: what the card reaches, to hold everything else against: copies, products, what a tensor core keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from beitv2_fast.kernels.native import native_ops
from bench.gpu.run import Run
from bench.harness import DEVICE

GIB = 1 << 30
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# A square product for the peak, then those of a B/16 step of 64 images and of its head.
PRODUCTS = (
    (8192, 8192, 8192), (12_608, 3072, 768), (12_608, 768, 3072), (12_608, 2304, 768), (4800, 8192, 768),
    (8192, 768, 4800),
)  # fmt: skip


def env(run: Run) -> None:
    run.say("native ops", compiled=native_ops())
    size = 1 << 20 if run.tiny else GIB
    run.time("copy on the device", partial(_copy, size, DEVICE), moved=2 * size, graph=False)
    run.time("copy from the host, pinned", partial(_copy, size // 4, "cpu"), moved=size // 4, graph=False)
    for dtype in DTYPES:
        for shape in PRODUCTS if dtype == "bf16" else PRODUCTS[:1]:
            m, n, k = (min(x, 64) for x in shape) if run.tiny else shape
            make = partial(product, m, n, k, dtype)
            run.time(f"product {dtype}", make, flops=2 * m * n * k, graph=False, shape=f"{m}x{n}x{k}")
    if run.on_gpu:
        with run.item("bits that a tensor core keeps"):
            run.say("bits that a tensor core keeps", kept_beside_1=kept_beside_one())


def _copy(size: int, source: object) -> Callable[[], object]:
    pinned = source == "cpu" and DEVICE.type == "cuda"
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device=source, pin_memory=pinned)
    b = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    return lambda: b.copy_(a, non_blocking=True)


def product(m: int, n: int, k: int, dtype: str) -> Callable[[], object]:
    a, b = (torch.randn(shape, device=DEVICE).to(DTYPES[dtype]) for shape in ((m, k), (k, n)))

    def run() -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def kept_beside_one() -> dict[int, float]:
    """By j: the share of 15 products of 2^-j that a product of fp16 matrices keeps beside one product of 1.

    The screening of codebook_search assumes that all is kept down to 2^-22.
    """
    kept = {}
    for j in range(20, 29):
        a = torch.zeros(64, 64, device=DEVICE, dtype=torch.float16)
        b = torch.zeros_like(a)
        a[:, 0], b[0] = 1, 1
        a[:, 1:16], b[1:16] = 2.0 ** -(j // 2), 2.0 ** -(j - j // 2)
        total = torch.mm(a, b, out_dtype=torch.float32)[0, 0].item()
        kept[j] = (total - 1) * 2.0**j / 15
    return kept
