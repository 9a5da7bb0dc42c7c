"""Peers that only a GPU can run, in the form of the benchmarks' own tables; torch's products by precision, compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import DEVICE, Unavailable
from bench.test_codebook_search import IMPLEMENTATIONS as SEARCHES
from bench.test_codebook_search import torch_matmul
from bench.test_masked_cross_entropy import EPS, Head

Search = Callable[[Tensor, Tensor], Callable[[], Tensor]]


def _need_gpu(package: str) -> None:
    if DEVICE.type != "cuda":
        raise Unavailable(f"{package} runs on a GPU")


def torch_search(precision: str, compiled: bool) -> Search:
    """normalize, matmul, argmax; in bf16 and TF32 the nearest code is not always found."""

    def nearest(x: Tensor, codebook: Tensor) -> Tensor:
        y = F.normalize(x, dim=-1)
        return ((y.bfloat16() if precision == "bf16" else y) @ codebook.T).argmax(-1)

    def make(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
        codes = codebook.bfloat16() if precision == "bf16" else codebook
        run = torch.compile(nearest) if compiled else nearest

        def call() -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            try:
                return run(x, codes)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = False

        return call

    return make


def flash_kmeans(dtype: torch.dtype) -> Search:
    """Its assignment by cosine, vectors and codes of unit length; fp32 multiplies in TF32 there."""

    def make(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
        _need_gpu("flash-kmeans")
        from flash_kmeans.assign_euclid_triton import cosine_assign_triton

        codes = codebook.to(dtype)[None]
        return lambda: cosine_assign_triton(F.normalize(x, dim=-1).to(dtype)[None], codes)[0]

    return make


def searches(tiny: bool) -> dict[str, Search]:
    """By name: ours, the benchmark's peers, torch in other precisions and compiled, flash-kmeans."""
    found: dict[str, Search] = {name: make for name, make in SEARCHES.items() if make is not torch_matmul}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"flash-kmeans assignment, {name}"] = flash_kmeans(dtype)
    for compiled in (False,) if tiny else (False, True):  # which takes longest to start, last
        for precision in ("fp32", "tf32", "bf16"):
            title = f"torch normalize + matmul + argmax, {precision}{', compiled' if compiled else ''}"
            found[title] = torch_search(precision, compiled)
    return found


def _hidden(p: Head) -> list[Tensor]:
    """The masked tokens of each branch, normalized, in bf16: what the heads below start from."""
    rows = [branch[p.mask] for branch in p.branches]
    return [F.layer_norm(x, p.norm_weight.shape, p.norm_weight, p.norm_bias, EPS).bfloat16() for x in rows]


def liger(p: Head) -> Tensor:
    _need_gpu("Liger")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight, bias = p.weight.bfloat16(), p.bias.bfloat16()
    return sum(liger_fused_linear_cross_entropy(x, weight, p.labels, bias) for x in _hidden(p))


def cut_cross_entropy(p: Head) -> Tensor:
    """It has no bias: its logits are those without."""
    _need_gpu("Cut Cross-Entropy")
    from cut_cross_entropy import linear_cross_entropy

    return sum(linear_cross_entropy(x, p.weight.bfloat16(), p.labels) for x in _hidden(p))


HEADS = {"Liger fused linear cross-entropy": liger, "Cut Cross-Entropy, without a bias": cut_cross_entropy}
