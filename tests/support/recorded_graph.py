"""CUDA graphs without CUDA: a capture records the ops on tensors, a replay runs the same ops on the same memory.

What the host decides while it captures stays decided, and what it reads from a tensor there is an error, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beitv2_fast.quantize.collapse import CLOCK  # the size of a tensor that stays with the host

from .dispatched import READS


class RecordedGraph(TorchDispatchMode):
    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what a capture, which computes nothing, has to put back
        self.replays = 0
        self.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.name in READS and args[0].untyped_storage().nbytes() != CLOCK * 8:
            raise RuntimeError(f"the host reads a tensor in a capture: {func}")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in reversed(self.before.values()):  # of several views the first was kept first
            tensor.copy_(value)


@contextmanager
def capturing(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    state = torch.get_rng_state()
    with graph:
        yield
    graph.restore()
    torch.set_rng_state(state)


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """-> the graphs that are made from here on."""
    RecordedGraph.made = []
    stands_in = {"CUDAGraph": RecordedGraph, "graph": capturing, "stream": lambda stream: nullcontext()}
    for name, value in {**stands_in, "Stream": lambda _: Mock(), "current_stream": lambda _: Mock()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return RecordedGraph.made
