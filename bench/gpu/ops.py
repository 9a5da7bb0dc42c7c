"""Sections search, vectors, quantizer, forms, masks, scaling and kernels: the ops beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from beitv2_fast.kernels import codebook_search, masked_gather
from bench import scaling as axes
from bench import test_codebook_update, test_masks, test_quantizer_forms, test_quantizer_step
from bench.gpu import clocks
from bench.gpu.head import TINY_HEAD, backward
from bench.gpu.peers import searches
from bench.gpu.run import Run
from bench.gpu.vectors import Case, made_up, not_nearest, of_a_tokenizer
from bench.harness import DEVICE, OURS, Unavailable
from bench.test_codebook_search import ours as search_ours
from bench.test_codebook_search import problem
from bench.test_masked_cross_entropy import problem as head_problem

N, K, D = 12_544, 8192, 32  # the default problem
TINY = (300, 64, 32)
MOST_SCORES = 1 << 29  # peers that build all scores stop at 2 GB of them


def size(run: Run) -> tuple[int, int, int]:
    return TINY if run.tiny else (N, K, D)


def work(n: int, k: int, d: int) -> dict[str, float]:
    """FLOPs of all scores; bytes: vectors and codes read once, indices written."""
    return {"flops": 2.0 * n * k * d, "moved": 4.0 * (n + k) * d + 8 * n}


def search(run: Run) -> None:
    n, k, d = size(run)
    x, codebook = problem(n, k, d)
    group = f"N={n} K={k} D={d}"
    with run.item("exactness", group=group):
        run.say("exactness", group=group, not_nearest=not_nearest(x, codebook))
    for name, make in searches(run.tiny).items():
        run.time(name, partial(make, x, codebook), group=group, **work(n, k, d))
    if not run.tiny:
        with run.item("agreement", group=group):
            exact = codebook_search(x, codebook).indices
            agree = {name: _agreement(make, x, codebook, exact) for name, make in searches(True).items()}
            run.say("agreement", group=group, share_of_nearest=agree)


def _agreement(make: Callable, x: Tensor, codebook: Tensor, exact: Tensor) -> float | str:
    try:
        return round((make(x, codebook)().long() == exact).double().mean().item(), 6)
    except (Unavailable, ImportError) as reason:
        return str(reason)[:80]


def _cases(run: Run) -> Iterator[Case]:
    n, k, d = size(run)
    yield from made_up(n, k, d)
    yield from of_a_tokenizer(n, k, run.tiny)


def vectors(run: Run) -> None:
    n, k, d = size(run)
    for name, x, codebook in _cases(run):
        group = f"N={n} K={k} D={d}"
        with run.item(f"exactness: {name}", group=group):
            run.say(f"exactness: {name}", group=group, not_nearest=not_nearest(x, codebook))
        run.time(name, partial(search_ours, x, codebook), group=group, **work(n, k, d))


def quantizer(run: Run) -> None:
    n, k, d = size(run)
    x, codebook = problem(n, k, d)
    indices = codebook_search(x, codebook).indices
    popular = torch.where(torch.arange(n, device=DEVICE) % 10 > 0, 7, indices)
    for title, chosen in (("spread", indices), ("one code of 9 in 10", popular)):
        for name, update in test_codebook_update.IMPLEMENTATIONS.items():
            state = codebook.clone(), torch.zeros(k, device=DEVICE)
            group, moved = f"update, {title}, N={n} K={k} D={d}", 4.0 * (n * d + 3 * k * d) + 8 * n
            run.time_call(name, partial(update, *state, x, chosen), group=group, moved=moved)
    upstream = torch.randn(n, d, device=DEVICE)
    for name, make in test_quantizer_step.IMPLEMENTATIONS.items():
        run.time(name, partial(_quantizer_step, make, x, codebook, upstream), group=f"step, N={n} K={k} D={d}")


def _quantizer_step(make: Callable, x: Tensor, codebook: Tensor, upstream: Tensor) -> Callable[[], Tensor]:
    leaf, forward = x.clone().requires_grad_(), make(codebook)

    def step() -> Tensor:
        quantized, loss = forward(leaf)
        return torch.autograd.grad(loss + (quantized * upstream).sum(), leaf)[0]

    return step


def forms(run: Run) -> None:
    n, k, d = size(run)
    for form in test_quantizer_forms.FORMS:
        group = f"{form}, N={n} K={k} D={d}"
        with run.item(form):
            for name, make in test_quantizer_forms.modules(form, k).items():
                run.time(name, partial(_form_step, make, n), group=group, seconds=0.1, graph=False)
    for name, call in test_quantizer_forms.four_nearest(n, k).items():
        run.time_call(name, call, group=f"4 nearest, N={n} K={k} D={d}", seconds=0.1, graph=False)


def _form_step(make: Callable[[], nn.Module], n: int) -> Callable[[], object]:
    return test_quantizer_forms.step(make(), n)


def kernels(run: Run) -> None:
    """The 30 longest kernels of a call, each by itself, on the default problems."""
    n, k, d = size(run)
    x, codebook = problem(n, k, d)
    p = head_problem(*TINY_HEAD) if run.tiny else head_problem()
    upstream = torch.randn(n, d, device=DEVICE)
    calls = {
        "codebook_search": lambda: (
            lambda: codebook_search(x, codebook, return_codes=True, return_distances=True, return_normalized=True)
        ),
        "quantizer step": lambda: _quantizer_step(test_quantizer_step.ours, x, codebook, upstream),
        "masked_cross_entropy": lambda: backward(OURS, p, torch.bfloat16),
    }
    for op, make in calls.items():
        with run.item(op):
            call = make()
            call()
            for name, (ms, launches) in list(clocks.kernel_times(call).items())[:30]:
                run.say(name[:120], op=op, ms=round(ms, 5), launches=launches)


def masks(run: Run) -> None:
    for name, call in test_masks.IMPLEMENTATIONS.items():
        there = name in test_masks.ON_DEVICE_TOO
        run.time_call(name, call, group=test_masks.GROUP, seconds=0.3, graph=False, on_device=there)
    p = head_problem(*TINY_HEAD) if run.tiny else head_problem()
    rows, width = len(p.labels), p.norm_weight.shape[0]
    upstream = torch.randn(rows, width, device=DEVICE)
    moved = 4.0 * (3 * upstream.numel() + p.tokens[0].numel())

    def ours() -> object:
        return torch.autograd.grad(masked_gather(p.branches[0], p.mask, num_masked=p.masked), p.tokens[0], upstream)

    def boolean_index() -> object:
        return torch.autograd.grad(p.branches[0][p.mask], p.tokens[0], upstream)

    for name, gather in ((OURS, ours), ("boolean index", boolean_index)):
        group = f"masked_gather, forward and backward, {rows} rows of {width}"
        run.time_call(name, gather, group=group, moved=moved)


def scaling(run: Run) -> None:
    """One axis grows at a time from the default problem, as in bench.scaling."""
    peers = searches(True)
    names = [OURS, "torch normalize + matmul + argmax, fp32", "torch normalize + matmul + argmax, bf16",
             "flash-kmeans assignment, bf16"]  # fmt: skip
    for axis in ("N", "K", "D"):
        values = axes.AXES[axis][:2] if run.tiny else axes.AXES[axis]
        for value in values:
            base = dict(zip("NKD", size(run), strict=True))
            n, k, d = {**base, axis: value}.values()
            if run.left() < 3:
                run.say(f"{axis} = {value}", skipped="no time is left in this section")
                continue
            x, codebook = problem(n, k, d)
            for name in names:
                if name not in (OURS, names[-1]) and n * k > MOST_SCORES:
                    continue
                about = {"axis": axis, "value": value, **work(n, k, d)}
                run.time(name, partial(peers[name], x, codebook), seconds=0.1, graph=False, **about)
