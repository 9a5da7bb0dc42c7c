"""Counts the bytes that torch allocates during a call, for tests of what an op must not write out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def allocations(run: Callable[[], object]) -> tuple[int, int, int]:
    """(peak, left, largest): bytes above the start at the peak and, with the result kept, at the end of ``run``; the
    largest single allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak, largest = max(peak, current), max(largest, event.nbytes())
    del kept
    return peak, current, largest


def peak_of_backward(loss: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Peak bytes of a forward and backward pass beyond the gradients, which any implementation must return."""
    peak, left, _ = allocations(lambda: torch.autograd.grad(loss(), inputs))
    return peak - left


def kept(model: nn.Module, *inputs: object) -> int:
    """Bytes that a forward of the model keeps for its backward, beside parameters and buffers."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(*inputs)
    return sum(t.untyped_storage().nbytes() for t in found.values())
