"""Section tune: launch shapes of the kernels beside the ones they have, with their results compared.

``kernel_cache`` compiles every candidate, so that a GPU only times them. The fastest of those that are right is written
down; whoever reads it changes the kernel's host file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from beitv2_fast.kernels.gpu import target_name
from bench.gpu import clocks
from bench.gpu.run import Run
from bench.harness import DEVICE

DEFAULT, TARGET, IMAGES = "as it is", "sm_90", 64
SUMS = 2.0**-6  # of the largest value: bf16, of sums in another order
Patches = Sequence[tuple[Any, str, Any]]  # object, attribute, value


@dataclass(frozen=True)
class Tuning:
    """A call and the shapes to try, each as patches of the host file. most: by how much a result may differ from the
    default's, of its largest value."""

    kernel: str
    call: Callable[[], Sequence[Tensor]]
    candidates: dict[str, Patches]
    most: float = SUMS


@contextmanager
def patched(patches: Patches) -> Iterator[None]:
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(patch.object(*each))
        yield


def constant(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def search_tunings(device: torch.device) -> Iterator[Tuning]:
    from beitv2_fast.kernels.codebook_search import triton as host

    x, codes = torch.randn(196 * IMAGES, 32, device=device), torch.randn(8192, 32, device=device)

    def planned(**values: Any) -> tuple[Any, str, Any]:
        return host, "PLANS", host.PLANS | {TARGET: replace(host.PLANS[TARGET], **values)}

    screens = {
        f"split {split}, {rows} rows, {warps} warps": (
            planned(configs=(host.Config(rows, warps, 3),)), (host, "choose_split", constant(split)),
        )
        for split, rows, warps in ((4, 64, 4), (4, 128, 8), (4, 128, 4), (8, 64, 4), (8, 128, 8), (2, 64, 4))
    }  # fmt: skip
    resolves = {
        f"{rows} rows, {warps} warps, {most} registers": (
            planned(resolve_rows=rows, resolve_options={"maxnreg": most}), (host, "resolve_warps", constant(warps)),
        )
        for rows, warps, most in ((1, 1, 255), (4, 1, 168), (4, 2, 255), (8, 2, 255), (8, 4, 255))
    }  # fmt: skip
    for data, codebook in (("", codes), (", each code 4 times", codes[:2048].repeat(4, 1))):
        call = partial(host.codebook_search_triton, x, codebook, "cosine", False, False, False)
        yield Tuning(f"screen{data}", call, screens, most=0.0)
        yield Tuning(f"resolve{data}", call, resolves, most=0.0)


def attention_tunings(device: torch.device) -> Iterator[Tuning]:
    from beitv2_fast.kernels.attention import triton as host

    qkv = torch.randn(IMAGES, 197, 3, 12, 64, device=device).bfloat16()
    bias, scale = torch.randn(12, 197, 197, device=device), 0.125
    forward = partial(host.attention_triton, qkv, bias, scale)
    out, lse = forward()
    backward = partial(host.attention_backward_triton, out, qkv, bias, out, lse, scale, True)
    plan = host.choose_plan(197, 64)
    for kernel, call, shapes in (
        ("forward", forward, ((64, 64), (64, 64, 4, 2), (128, 32, 8), (128, 64, 8, 2))),
        ("keys", backward, ((64, 64), (32, 32), (64, 32, 4, 2), (128, 32, 8))),
        ("together", backward, ((64, 32), (64, 64, 8), (64, 64, 4, 2))),
    ):
        plans = {str(shape): (replace(plan, **{kernel: host.Blocks(*shape)}),) for shape in shapes}
        candidates = {s: [(host, "PLANS", host.PLANS | {TARGET: new})] for s, new in plans.items()}
        yield Tuning(f"attention, {kernel}", call, candidates)


def row_tunings(device: torch.device) -> Iterator[Tuning]:
    from beitv2_fast.kernels.gelu import triton as gelu
    from beitv2_fast.kernels.masked_cross_entropy import triton as head
    from beitv2_fast.kernels.residual_norm import triton as norm

    rows, classes, fp32, bf16 = 64 * IMAGES, 8192, torch.float32, torch.bfloat16
    given, labels = torch.randn(rows, classes, device=device).bfloat16(), torch.arange(rows, device=device) % classes
    losses, correct = torch.empty(rows, device=device), torch.empty(rows, dtype=torch.bool, device=device)

    def softmax() -> Sequence[Tensor]:
        logits = given.clone()
        head.softmax_triton_(logits, None, labels, losses, correct, True, None)
        return logits, losses

    launches = [{"BLOCK_V": classes, "num_warps": w, "maxnreg": n} for w, n in ((16, 128), (8, 128), (8, 255))]
    softmaxes = {str(each): [(head, "softmax_launch", constant(each))] for each in launches}
    yield Tuning("softmax_rows, with a copy", softmax, softmaxes)

    x, row, keep = torch.randn(IMAGES, 197, 768, device=device), torch.ones(768, device=device), None
    forward = partial(norm.residual_norm_triton, x, x.bfloat16(), row, keep, 1.0, row, row, 1e-6, fp32, bf16)
    total, _, mean, rstd = forward()
    moments = total, mean, rstd, x.bfloat16(), row, keep, 1.0, row, fp32, bf16
    backward = partial(norm.residual_norm_backward_triton, x, x.bfloat16(), *moments)
    launches = [{"BLOCK_C": 1024, "num_warps": warps} for warps in (1, 2, 8)]
    yield Tuning("residual_norm", forward, {str(e): [(norm, "forward_launch", constant(e))] for e in launches})
    backwards = {
        f"{rows} rows, {warps} warps, {programs} programs": [
            (norm, "backward_launch", constant({"BLOCK_R": rows, "BLOCK_C": 1024, "num_warps": warps})),
            (norm, "PROGRAMS", programs),
        ]
        for rows, warps, programs in ((1, 4, 264), (1, 4, 1056), (2, 4, 528), (2, 8, 528), (4, 8, 264))
    }
    yield Tuning("residual_norm, backward", backward, backwards)
    hidden = torch.randn(IMAGES * 197, 3072, device=device).bfloat16()
    gelus = {str(s): ((gelu, "BLOCK", s[0]), (gelu, "NUM_WARPS", s[1])) for s in ((2048, 4), (2048, 8), (4096, 8))}
    yield Tuning("gelu_and_gradient", partial(gelu.gelu_and_gradient_triton, hidden, hidden), gelus)


def tunings(device: torch.device) -> Iterator[Tuning]:
    for part in (search_tunings, attention_tunings, row_tunings):
        yield from part(device)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest in any result, of its largest value; NaN if there is one."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return float(torch.stack([(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs]).max())


def tune(run: Run) -> None:
    if not run.on_gpu or target_name() != TARGET:
        return run.say("launch shapes", skipped=f"a GPU of {TARGET} is needed, whose shapes these are")
    for each in tunings(DEVICE):
        expected, taken = [result.clone() for result in each.call()], {}
        for shape, patches in ({DEFAULT: ()} | each.candidates).items():
            with run.item(shape, group=each.kernel), patched(patches):
                run.need_time()
                apart = difference(each.call(), expected)
                times = clocks.all_times(each.call, seconds=0.05, graph=False)
                run.say(shape, group=each.kernel, difference=apart, right=apart <= each.most, **times.numbers())
                if apart <= each.most:
                    taken[shape] = times.gpu
        if taken:
            best = min(taken, key=lambda shape: taken[shape])
            run.say("fastest", group=each.kernel, shape=best, gpu_ms=taken[best], default_ms=taken.get(DEFAULT))
