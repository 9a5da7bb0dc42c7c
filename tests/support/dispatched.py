"""What torch is asked for between two moments: how many ops that would be launches on a GPU, and how often the host
reads a tensor, for which it would wait there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item", "aten::equal", "aten::nonzero")
NO_LAUNCH = ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
NOT_OF_A_DEVICE = ("profiler::", "aten::promote_types")


class Dispatched(TorchDispatchMode):
    """Counts by name within ``with``; ops of torch and of this package that only make a view are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and name not in NO_LAUNCH and not name.startswith(NOT_OF_A_DEVICE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def within(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        """An op's, such that what it asks torch for is counted, too."""

        def run(*args: Any) -> Any:
            with self:
                return implementation(*args)

        return run

    @property
    def reads(self) -> dict[str, int]:
        return {name: self.counts[name] for name in READS if self.counts[name]}

    @property
    def launches(self) -> int:
        return sum(self.counts.values())
