"""Host time on a GPU, told without one, of a quantizer step and of the head: `python -m bench.host_time`.

All runs but the driver: the GPU's implementation of each op, on small CPU tensors, launches kernels that were compiled
for sm_90 and that nothing starts (tests/support/launches.py). Torch's own ops run on the CPU. So the times are lower
bounds, to be compared with one another. Each is the shortest of many single calls, which no other process disturbed.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from beitv2_fast.kernels.codebook_search import ops as search_ops
from beitv2_fast.kernels.codebook_update import ops as update_ops
from beitv2_fast.kernels.masked_cross_entropy import ops as head_ops
from beitv2_fast.kernels.vector_quantize import ops as quantize_ops
from beitv2_fast.quantize import collapse
from bench.harness import OURS, machine
from bench.test_codebook_search import problem
from bench.test_masked_cross_entropy import IMPLEMENTATIONS as HEADS
from bench.test_masked_cross_entropy import problem as head_problem
from bench.test_quantizer_step import only_ops, ours, reference_structure
from tests.support.launches import NoDevice

N = K = 256  # few, so that what torch does on the CPU costs little
D = 32
ON_GPU = (
    search_ops.codebook_search_op, update_ops.codebook_statistics, update_ops.apply_statistics, update_ops.count_uses,
    quantize_ops.quantize_backward, head_ops.masked_positions, head_ops.masked_cross_entropy_op,
    head_ops.with_gradient_backward,
)  # fmt: skip


class Loaded(NoDevice):
    """A kernel is loaded once."""

    def load_binary(self, *_: Any) -> tuple[bool, None, int, int, int]:
        return True, *super().load_binary()[1:]

    def unload_module(self, module: bool) -> None:
        pass


def shortest(call: Callable[[], object], calls: int) -> float:
    """Microseconds."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times)


def steps() -> dict[str, Callable[[], object]]:
    """Forward, backward and codebook update, and what of it is left without its outer layers."""
    x, codebook = problem(N, K, D)
    leaf, upstream, one = x.requires_grad_(), torch.randn(N, D), torch.ones(())

    def step(forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(leaf), leaf, (upstream, one))

    module, ops = step(ours(codebook)), step(only_ops(codebook))
    return {
        f"{OURS}: the module": module,
        "its ops and autograd": ops,
        "what these call: a launch's arguments, outputs and scratch": again(module, implementations),
        "the launches themselves": again(module, launches),
        "reference implementation's structure": step(reference_structure(codebook)),
    }


def heads() -> dict[str, Callable[[], object]]:
    """Forward and backward in fp32, of two branches in one chunk."""
    p = head_problem(2, 8, 3, 16, 64)

    def step(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(HEADS[name](p), p.leaves)

    return {OURS: step(OURS), "the launches of its kernels": again(step(OURS), launches), "eager": step("eager")}


Calls = list[Callable[[], object]]


def again(step: Callable[[], object], kept: Callable[[Calls], AbstractContextManager[None]]) -> Callable[[], object]:
    """The calls of one kind that a step makes, with the same arguments."""
    step()  # what is tried to tune a launch is no part of a step
    calls: Calls = []
    with kept(calls):
        step()
    return lambda: [call() for call in calls]


@contextmanager
def implementations(calls: Calls) -> Iterator[None]:
    with ExitStack() as stack:
        for op in ON_GPU:
            run = op.kernels["cpu"]

            def run_and_keep(*arguments: Any, run: Callable = run) -> Any:
                calls.append(partial(run, *arguments))
                return run(*arguments)

            stack.enter_context(patch.dict(op.kernels, cpu=run_and_keep))
        yield


@contextmanager
def launches(calls: Calls) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def run_and_keep(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        calls.append(partial(run, self, *arguments, **options))
        return run(self, *arguments, **options)

    with patch.object(JITFunction, "run", run_and_keep):
        yield


def pretend() -> None:
    """From here on CPU tensors are treated as those of a GPU."""
    from triton.runtime import driver

    driver._active = Loaded("sm_90")
    collapse.host_waits_for = lambda x: True
    for op in ON_GPU:
        op.kernels["cpu"] = op.kernels.get("cuda", op._init_fn)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="of which the shortest counts")
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    pretend()
    print(machine(), f"torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}")
    for what, rows in (("quantizer step", steps()), ("head, forward and backward", heads())):
        print(f"\n| {what} | host us |\n|---|---|")
        for name, step in rows.items():
            shortest(step, 20)
            gc.disable()
            print(f"| {name} | {shortest(step, calls):.0f} |")
            gc.enable()


if __name__ == "__main__":
    main()
