"""Against codebook collapse: codes that no vector chooses restart at vectors of the batch, at worst all by k-means.

In compiled code both are opaque ops, so that a training step has no graph break although the host decides here. It
decides by the buffers ``initialized`` and ``steps``. On the CPU it reads them. Elsewhere it would have to wait for the
device, so it goes by its own copy, ``clock``, as long as nobody else wrote to them: see ``look``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.codebook_update.dead_codes import find_dead, restart_dead_codes
from ..kernels.codebook_update.ops import count_uses, of_each
from ..kernels.registration import custom_op
from ..kernels.sampling import salt
from .kmeans import kmeans

REPLACE_EVERY = 8  # steps between looks for dead codes
# Whether compiled code calls refuse_gathered_copy: dynamo of older versions takes no module as a constant's argument.
ASKED_WHEN_COMPILED = torch.__version__ >= "2.14"
# The places in ``clock``, int64 on the CPU: is it started, how many steps, and of ``initialized`` its address, its
# version counter and by how much that last went on between two looks.
STARTED, STEPS, ADDRESS, VERSION, STRIDE = range(CLOCK := 5)
TICK = torch.tensor([place == STEPS for place in range(CLOCK)], dtype=torch.int64, device="cpu")


def look(clock: Tensor, initialized: Tensor, steps: Tensor) -> bool:
    """Whether k-means has started the codebook; brings the clock up to date. Called once per step, before any change.

    The host reads the device, and waits, if the clock does not say that it is started, or if ``initialized`` is another
    tensor than at the last look or was written to: its version counter went on otherwise than from step to
    step (compiled code advances it in every step, by the same number each time). Writes through ``.data``, which count
    no version, are noticed on the CPU only.
    """
    if not host_waits_for(initialized):
        clock[STARTED], clock[STEPS] = initialized, steps
        return bool(clock[STARTED])
    known = clock.tolist()
    address, version = initialized.data_ptr(), 0 if initialized.is_inference() else initialized._version
    stride = version - known[VERSION]
    started_here = bool(known[STARTED]) and address == known[ADDRESS]
    if is_capturing(initialized):
        if not started_here:
            raise RuntimeError(
                "a CUDA graph is being captured, and the host does not know whether the codebook is started. Run two "
                "training steps before the capture: k-means cannot be part of a graph."
            )
    elif not started_here or stride != known[STRIDE] or initialized.is_inference():
        clock[STARTED], clock[STEPS] = initialized, steps
    if known[ADDRESS:] != [address, version, stride]:  # almost never: a write to a tensor costs more than the rest
        clock[ADDRESS], clock[VERSION], clock[STRIDE] = address, version, stride
    return bool(clock.tolist()[STARTED])


_CHANGED = ("codebook", "cluster_size", "embed_avg", "idle", "recent", "clock")


@custom_op("beitv2_fast::start_codebook", mutates_args=(*_CHANGED, "initialized"))
def start_codebook(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    idle: Tensor,
    recent: Tensor | None,
    initialized: Tensor,
    steps: Tensor,
    clock: Tensor,
    x: Tensor,
    metric: str,
    iterations: int,
    seed: int,
    restart_below: float,
    restart_after: int,
    group: str | None = None,
) -> None:
    """k-means where it is due: before the first step, and when the codebook collapsed.

    Collapsed: in the last ``restart_after`` steps fewer than ``restart_below`` of the codes were chosen.

    Args:
        codebook, embed_avg: [K, D], or of G codebooks [G, K, D]. cluster_size, idle: [K] or [G, K].
        recent: as idle, how often each code was chosen since the last look for a collapse.
        x: [N, D], rows of the codebooks in turn; NaN marks those that do not count.
        group: the name of the process group over whose ranks all is summed and drawn; by default the default one.
    """
    started, count = look(clock, initialized, steps), int(clock[STEPS])
    books = of_each(codebook, cluster_size, embed_avg, idle)
    due = [not started] * len(books)
    if restart_below > 0 and is_capturing(x):
        raise RuntimeError("restart_below looks at the device, which a CUDA graph cannot: use 0 to capture this step")
    if recent is not None and restart_below > 0 and count and count % restart_after == 0:
        possible = recent.sum(-1).clamp(max=recent.shape[-1])
        collapsed = (recent > 0).sum(-1) < restart_below * possible
        due = [a or b for a, b in zip(due, collapsed.view(-1).tolist(), strict=True)]
        recent.zero_()
    for g in (g for g, wanted in enumerate(due) if wanted):
        options: dict[str, Any] = {"metric": metric, "iterations": iterations, "group": group}
        codes, sizes, average, idle_of = books[g]
        found, bins = kmeans(x[g :: len(books)], len(codes), seed=int(salt(seed, count, g)), **options)
        if not bins.any():
            return  # no rank has a vector: the next batch will do
        codes.copy_(found)
        idle_of.zero_()
        if average is not None:
            average.copy_(codes * sizes.copy_(bins.clamp(min=1))[:, None])
    if not started:
        initialized.fill_(True)
        clock[STARTED] = 1


@custom_op("beitv2_fast::replace_dead_codes", mutates_args=(*_CHANGED, "window", "replaced", "steps"))
def replace_dead_codes(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    idle: Tensor,
    recent: Tensor | None,
    window: Tensor,
    replaced: Tensor,
    steps: Tensor,
    clock: Tensor,
    x: Tensor,
    bins: Tensor,
    metric: str,
    seed: int,
    dead_after: float,
    dead_below: float,
    group: str | None = None,
) -> None:
    """Count uses, and every few steps restart the dead codes at vectors of the batch, with all of their state.

    Args: as in ``start_codebook``, and
        bins: as idle, how often each code was chosen in this step, over all ranks.
        window: as idle, how often each code was chosen since the last log.
        replaced: scalar, counts the codes that were restarted. steps: scalar, the device's copy of the clock.
        dead_after: codes that this many times K vectors did not choose are dead; 0: none.
        dead_below: codes whose cluster size fell under this are dead; 0: none.
    """
    count_uses(bins, idle, window, steps)
    count: Tensor | int = clock.add_(TICK).tolist()[STEPS]
    if recent is not None:
        recent += bins
    if dead_after <= 0 and dead_below <= 0:
        return
    captured = is_capturing(x)  # then the device decides, in every replay, and the host no longer knows what step it is
    if not captured and count % REPLACE_EVERY:
        return
    dead = find_dead(cluster_size, idle, dead_after * idle.shape[-1], dead_below)
    if captured:
        dead, count = dead & (steps % REPLACE_EVERY == 0), steps
        clock[STRIDE] = -1  # look again
    elif not host_waits_for(dead) and not dead.any():
        return  # the same answer on every rank; on a GPU the question would cost more than the work
    books = of_each(codebook, cluster_size, embed_avg, idle, dead)
    for g, (*state, dead_of) in enumerate(books):
        options: dict[str, Any] = {"metric": metric, "least_size": dead_below, "process_group": group}
        rows = x[g :: len(books)]
        replaced += restart_dead_codes(dead_of, rows, *state, salt=salt(seed, count, g), **options).sum()


def host_waits_for(x: Tensor) -> bool:
    """Whether the host has to wait for its device to read it."""
    return x.device.type != "cpu"


def is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@start_codebook.register_fake
@replace_dead_codes.register_fake
def _nothing(*args: object) -> None:
    return None


def refuse_gathered_copy(module: nn.Module, name: str) -> None:
    """RuntimeError if a parameter that forwards write to is, in a forward, only a gathered copy of a sharded one.

    FSDP throws that copy away after the forward, and ZeRO 3 keeps its own masters: what is written would be lost.
    """
    parameter = module._parameters.get(name, getattr(module, name))
    if hasattr(parameter, "ds_id"):
        by = "DeepSpeed ZeRO 3"
    elif getattr(parameter._base, "_is_flat_param", False) or _sharded_by_fsdp2(module, name):
        by = "FSDP"
    else:
        return
    raise RuntimeError(
        f"learning='gradient' writes restarted codes into the parameter {name}, of which {by} leaves only a gathered "
        "copy here: they would be lost. Either keep the parameter whole (fully_shard(..., ignored_params="
        "{quantizer.codebook}), ignored_states of FSDP, ZeRO stages up to 2), or take learning='sum_ema', whose "
        "codebook is a buffer, or turn restarts off: kmeans_init=False, dead_after=0, restart_below=0."
    )


def _sharded_by_fsdp2(module: nn.Module, name: str) -> bool:
    """Whether fully_shard has it; it is a plain parameter then, without a mark, while a forward runs."""
    states = sys.modules.get("torch.distributed._composable_state")
    for state in list(states._module_state_mapping.values()) if states else ():
        for group in getattr(state(), "_fsdp_param_groups", ()):
            infos = [p._module_info for p in group.fsdp_params]
            if any(i.module is module and i.param_name == name for i in infos):
                return True
    return False


# Compiled code takes the answer that it had when it was traced: see torch.compiler.assume_constant_result.
refuse_gathered_copy._dynamo_marked_constant = True  # type: ignore[attr-defined]  # mypy knows none of functions


ADVICE = (
    "Lower --lr or lengthen --warmup-epochs (features that move faster than the codebook leave it behind); lower "
    "--dead-after, so that idle codes restart sooner; lower --decay; a shallower --decoder-depth or a smaller "
    "--num-codes or --code-dim uses more of the codes. docs/quantizer.md tells what was measured."
)


class CollapseWatch:
    """Warns once for every ``steps`` steps in a row in which less than ``below`` of the codes were used."""

    def __init__(self, below: float, steps: int):
        self.below, self.steps, self.low = below, steps, 0

    def look(self, used: float, steps: int) -> str | None:
        """``used``: the share of the codes that were chosen in the last ``steps`` steps. Returns a warning, or None."""
        self.low = self.low + steps if used < self.below else 0
        if self.low < self.steps:
            return None
        count, self.low = self.low, 0
        return (
            f"codebook collapse: in the last lines of the log, {count} steps, less than {self.below:.0%} of the codes "
            f"were used (now {used:.1%}). {ADVICE}"
        )
