"""Sections attention and xformers: attention with a learned bias, by each implementation that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from beitv2_fast.models.attention import IMPLEMENTATIONS, choose_attention, prepare_bias
from beitv2_fast.models.attention import attend as by_name
from bench.gpu.run import Run
from bench.harness import DEVICE
from bench.test_attention import flex

BF16 = torch.bfloat16
# B, H, N, d: base at 224, large at 384, images of 64 pixels.
SHAPES = ((64, 12, 197, 64), (256, 12, 197, 64), (16, 16, 577, 64), (512, 6, 65, 64))
TINY = ((1, 2, 17, 16),)
WITHOUT_BIAS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
Kind = tuple[str, bool, bool]  # title, backward, gradient of the bias
KINDS: tuple[Kind, ...] = (
    ("forward and backward, gradient of the bias", True, True),
    ("forward and backward, bias fixed", True, False),
    ("forward", False, False),
)


def implementations() -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor], str]]:
    """(name, function of qkv and bias, whose form of the bias)."""
    for name in IMPLEMENTATIONS[1:]:
        yield name, partial(by_name, implementation=name), name
    yield "flex_attention, compiled", flex, "sdpa"


def attention(run: Run) -> None:
    run.say("chosen", auto=choose_attention("auto", DEVICE.type))
    for shape in TINY if run.tiny else SHAPES:
        B, H, N, d = shape
        group, product = f"B={B} H={H} N={N} d={d} bf16", B * H * N * N * d
        qkv = torch.randn(B, N, 3, H, d, device=DEVICE, dtype=BF16)
        table, up = torch.randn(1, H, N, N, device=DEVICE), torch.randn(B, N, H * d, device=DEVICE, dtype=BF16)
        for title, backward, learned in KINDS:
            flops = (14.0 if backward else 4.0) * product
            # Forward reads q, k, v and writes the output; backward reads these and its gradient, and writes three.
            moved = 2.0 * qkv.numel() / 3 * (12 if backward else 4)
            for name, function, form in implementations():
                if name.startswith("flex") and (run.tiny or shape != SHAPES[0] or not (learned or not backward)):
                    continue  # it compiles for half a minute, each time; on a CPU it has no backward
                make = partial(_call, function, form, qkv, table, up, backward, learned)
                run.time(name, make, group=f"{group}, {title}", flops=flops, moved=moved)
        _without_bias(run, group, qkv, up, product)


def _call(
    function: Callable, form: str, qkv: Tensor, table: Tensor, up: Tensor, backward: bool, learned: bool
) -> Callable[[], object]:
    """The bias as the blocks get it: prepared once a forward for all of them, which is not timed."""
    with torch.autocast(DEVICE.type, BF16):
        bias = prepare_bias(table, form).detach().requires_grad_(learned)
    if not backward:
        return lambda: function(qkv, bias)
    leaf = qkv.clone().requires_grad_()
    leaves = (leaf, bias) if learned else (leaf,)
    return lambda: torch.autograd.grad(function(leaf, bias), leaves, up)


def _without_bias(run: Run, group: str, qkv: Tensor, up: Tensor, product: float) -> None:
    """What attention costs without a bias, by SDPA's backends and by ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = WITHOUT_BIAS if run.on_gpu else ("auto",)
    for title, backward in (("forward and backward, no bias", True), ("forward, no bias", False)):
        for name in (*names, "native"):
            ours, backend = name == "native", getattr(SDPBackend, name, None)
            with nullcontext() if backend is None else sdpa_kernel(backend):
                make = partial(_no_bias, "native" if ours else "sdpa", qkv, up, backward)
                about = {"group": f"{group}, {title}", "flops": (14.0 if backward else 4.0) * product}
                run.time(name if ours else f"sdpa, {name}", make, **about)


def _no_bias(name: str, qkv: Tensor, up: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: by_name(qkv, None, name)
    leaf = qkv.clone().requires_grad_()
    return lambda: torch.autograd.grad(by_name(leaf, None, name), leaf, up)


def xformers(run: Run) -> None:
    with run.item("chosen"):
        import xformers as package

        run.say("chosen", auto=choose_attention("auto", DEVICE.type), version=package.__version__)
    B, H, N, d = (TINY if run.tiny else SHAPES)[0]
    qkv = torch.randn(B, N, 3, H, d, device=DEVICE, dtype=BF16)
    table, up = torch.randn(1, H, N, N, device=DEVICE), torch.randn(B, N, H * d, device=DEVICE, dtype=BF16)
    with run.item("against sdpa"):
        results = [
            _call(partial(by_name, implementation=name), name, qkv, table, up, True, True)()
            for name in ("xformers", "sdpa")
        ]
        errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(*results, strict=True)]
        run.say("against sdpa", relative_error_of_gradients=errors, right=max(errors) < 0.02)
