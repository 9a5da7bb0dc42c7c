"""Against codebook collapse: codes that nobody chooses start again at vectors of the batch; at worst, k-means does.

Both are opaque ops, so that a compiled training step has no graph break although the host decides here. What the
host needs to know lies in ``clock``, a tensor on the CPU, [initialized, steps]: no step waits for the device. 0 in its
first place says that the device has to be asked, as after a checkpoint was loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.codebook_update.dead_codes import count_idle, find_dead, restart_dead_codes
from .kernels.sampling import salt
from .kmeans import kmeans

REPLACE_EVERY = 8  # steps between looks for dead codes


@torch.library.custom_op(
    "beitv2_fast::start_codebook",
    mutates_args=("codebook", "cluster_size", "embed_avg", "initialized", "idle", "recent", "clock"),
)
def start_codebook(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    initialized: Tensor,
    steps: Tensor,
    idle: Tensor,
    recent: Tensor,
    clock: Tensor,
    x: Tensor,
    metric: str,
    iterations: int,
    seed: int,
    restart_below: float,
    restart_after: int,
) -> None:
    """k-means where it is due: before the first step, and when the codebook collapsed.

    Collapsed: in the last ``restart_after`` steps fewer than ``restart_below`` of the codes were chosen.

    Args:
        codebook: [G, K, D], G codebooks. cluster_size, idle: [G, K]. embed_avg: [G, K, D], or empty.
        recent: [G, K], how often each code was chosen since the last look for a collapse; or empty.
        x: [G, N, D]; NaN marks rows that do not count.
    """
    if not clock[0] and initialized:
        clock[0], clock[1] = 1, steps
    due = [not clock[0]] * len(codebook)
    count = int(clock[1])
    if restart_below > 0 and count and count % restart_after == 0:
        possible = recent.sum(-1).clamp(max=recent.shape[-1])
        collapsed = (recent > 0).sum(-1) < restart_below * possible
        due = [a or b for a, b in zip(due, collapsed.tolist(), strict=True)]
        recent.zero_()
    for g in (g for g, wanted in enumerate(due) if wanted):
        codes, bins = kmeans(x[g], codebook.shape[1], metric=metric, iterations=iterations, seed=salt(seed, count, g))
        if not bins.any():
            return  # no rank has a vector: the next batch will do
        codebook[g] = codes
        idle[g] = 0
        if embed_avg.numel():
            cluster_size[g] = bins.clamp(min=1)
            embed_avg[g] = codes * cluster_size[g][:, None]
    if not clock[0]:
        initialized.fill_(True)
        clock[0], clock[1] = 1, steps


@torch.library.custom_op(
    "beitv2_fast::replace_dead_codes",
    mutates_args=("codebook", "cluster_size", "embed_avg", "idle", "recent", "replaced", "steps", "clock"),
)
def replace_dead_codes(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    idle: Tensor,
    recent: Tensor,
    replaced: Tensor,
    steps: Tensor,
    clock: Tensor,
    x: Tensor,
    bins: Tensor,
    metric: str,
    seed: int,
    dead_after: float,
    dead_below: float,
) -> None:
    """Count idleness, and every few steps restart the dead codes at vectors of the batch, with all of their state.

    Args: as in ``start_codebook``, and
        bins: [G, K], how often each code was chosen in this step, over all ranks.
        replaced: scalar, counts the codes that were restarted. steps: scalar, the device's copy of the clock.
        dead_after: dead is who was not chosen for this many times K vectors; 0: nobody.
        dead_below: dead is whose cluster size fell under this; 0: nobody.
    """
    steps += 1
    clock[1] += 1
    count_idle(idle, bins)
    if recent.numel():
        recent += bins
    if int(clock[1]) % REPLACE_EVERY or (dead_after <= 0 and dead_below <= 0):
        return
    dead = find_dead(cluster_size, idle, dead_after * idle.shape[-1], dead_below)
    if dead.device.type == "cpu" and not dead.any():
        return  # the same answer on every rank; on a GPU the question would cost more than the work
    for g in range(len(codebook)):
        average = embed_avg[g] if embed_avg.numel() else None
        state = (codebook[g], cluster_size[g], average, idle[g])
        options = {"metric": metric, "salt": salt(seed, int(clock[1]), g), "least_size": dead_below}
        replaced += restart_dead_codes(dead[g], x[g], *state, **options).sum()


@start_codebook.register_fake
@replace_dead_codes.register_fake
def _nothing(*args: object) -> None:
    return None
