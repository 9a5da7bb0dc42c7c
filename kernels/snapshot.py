"""The codebook as one forward searched it: a copy that no later change reaches.

Two kinds of readers come after the change. Compiled code: inductor may read a tensor again, in the backward too, after
an op wrote to it, and may give the memory of what a mutating op returned, even a parameter's, to the backward; only
what an opaque op returned belongs to nobody else. And checkpointed regions, which run their forward a second
time, inside the backward: the second must find the codes of the first.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .registration import custom_op

MOST = 32  # forwards of one quantizer whose recomputation may be outstanding
SAME_VECTORS = 1e-3  # marks of the same vectors differ by less, relative to their size


@custom_op("beitv2_fast::copy_codebook")
def copy_codebook(codebook: Tensor, searched: Tensor | None) -> Tensor:
    """``searched``, by default the codebook itself, copied to fp32. The gradient passes to the codebook."""
    if searched is None and recomputing():
        raise RuntimeError(
            "activation checkpointing recomputes a quantizer that is compiled: it would learn twice and find other "
            "codes. Leave the quantizer out of the checkpointed region, or out of torch.compile."
        )
    return (codebook if searched is None else searched).to(torch.float32, copy=True)


@copy_codebook.register_fake
def _copy_codebook_fake(codebook: Tensor, searched: Tensor | None) -> Tensor:
    return torch.empty_like(codebook, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient.to(ctx.dtype), None


copy_codebook.register_autograd(_backward, setup_context=_setup_context)


def recomputing() -> bool:
    """Whether this forward runs inside a backward: a checkpointed region that runs once more."""
    return torch._C._current_graph_task_id() != -1


def to_be_recomputed() -> bool:
    """Whether this forward may run once more: hooks take the place of what autograd saves (checkpoints with
    use_reentrant=False), or an autograd.Function runs it in its own forward (use_reentrant=True, DeepSpeed's)."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return True
    frame = None if torch.is_grad_enabled() else sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


@dataclass
class Snapshot:
    """What the recomputation of a forward needs: codebook, counts, key of a draw; ``mark`` tells the vectors it saw."""

    mark: Tensor
    codebook: Tensor
    counts: Tensor | None = None
    draw: Tensor | None = None
    recomputed: bool = False


class Snapshots:
    """Those of one quantizer, from a forward in a checkpointed region until the next one after its recomputation."""

    def __init__(self) -> None:
        self.kept: list[Snapshot] = []
        self.lost = False

    def keep(self, x: Tensor, codebook: Tensor) -> Snapshot:
        """That of a first forward of the vectors x [N, D]."""
        kept = [snapshot for snapshot in self.kept if not snapshot.recomputed]
        self.lost = self.lost or len(kept) >= MOST
        self.kept = [*kept[-MOST + 1 :], Snapshot(_mark(x), codebook.detach().clone())]
        return self.kept[-1]

    def find(self, x: Tensor) -> Snapshot | None:
        """That of the first forward of these vectors, None if none was kept.

        A recomputation has the vectors of its first forward, but several come in any order. One is found without a
        look at the device; among several the host compares marks, and waits. Of forwards of the very same vectors a
        backward recomputes the last one first, and one whose result was dropped came before them.
        """
        if not self.kept:
            return None
        found = self.kept[0]
        if len(self.kept) > 1 or self.lost:
            mark = _mark(x)
            apart = torch.stack([(s.mark - mark).norm() for s in self.kept]).tolist()
            nearest = min(range(len(apart)), key=lambda i: (apart[i], self.kept[i].recomputed, -i))
            if not apart[nearest] <= SAME_VECTORS * (1 + mark.norm().item()):
                raise RuntimeError(
                    f"a checkpointed forward is recomputed whose codebook is no longer kept: more than {MOST} forwards "
                    "of one quantizer came before the backward, or the region does not give the same vectors again"
                )
            found = self.kept[nearest]
        found.recomputed = True
        return found


def _mark(x: Tensor) -> Tensor:
    """The sum of the rows, weighted by their place: [N, D] -> [D]."""
    weights = torch.linspace(1, 2, x.shape[0], dtype=torch.float64, device=x.device)
    return (x.detach().double().nan_to_num() * weights[:, None]).sum(0)
