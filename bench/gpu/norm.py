"""Section norm: the residual, layer scale, drop path and LayerNorm between two branches, and the residual alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beitv2_fast.kernels import residual_norm
from beitv2_fast.kernels.residual_norm.reference import residual_norm_reference
from bench.gpu.run import Run
from bench.harness import DEVICE, OURS

BF16, EPS, KEEP_RATE = torch.bfloat16, 1e-6, 0.9
SHAPES = ((512, 65, 384), (256, 197, 768))  # images, tokens, width
TINY = ((2, 5, 32),)


def norm(run: Run) -> None:
    for B, N, C in TINY if run.tiny else SHAPES:
        x, branch = torch.randn(2, B, N, C, device=DEVICE).unbind(0)
        gamma, weight, bias = torch.randn(3, C, device=DEVICE).unbind(0)
        keep = torch.ones(B, device=DEVICE)
        tensors = x, branch.to(BF16), gamma, weight, bias
        for title, normed, forward, both in (("with the norm", True, 12, 30), ("without a norm", False, 10, 18)):
            for backward in (False, True):
                group = f"B={B} N={N} C={C}, {title}, {'forward and backward' if backward else 'forward'}"
                moved = x.numel() * float(both if backward else forward)
                for name, function in implementations(run.tiny).items():
                    make = partial(_call, function, tensors, keep, normed, backward)
                    run.time(name, make, group=group, moved=moved)


def implementations(tiny: bool) -> dict[str, Callable]:
    compiled = {} if tiny else {"torch.compile": torch.compile(residual_norm_reference, fullgraph=True)}
    return {OURS: residual_norm, "eager": residual_norm_reference, **compiled}


def _call(
    function: Callable, tensors: tuple[Tensor, ...], keep: Tensor, normed: bool, backward: bool
) -> Callable[[], object]:
    """The norm as the product after it reads it, in bf16."""
    x, branch, gamma, *parameters = (t.clone().requires_grad_(backward) for t in tensors)
    parameters = parameters if normed else [None, None]
    leaves = [x, branch, gamma, *(parameters if normed else ())]
    above = [torch.ones_like(x), *([torch.ones_like(branch)] if normed else ())]

    def forward() -> list[Tensor]:
        with torch.autocast(DEVICE.type, BF16):
            total, out = function(x, branch, gamma, keep, KEEP_RATE, *parameters, EPS)
            return [total] if out is None else [total, out.to(BF16)]

    return (lambda: torch.autograd.grad(forward(), leaves, above)) if backward else forward
