"""Memory and communication of a training step by ZeRO stage and number of GPUs: `python -m bench.zero_cost`.

What is counted: weights, gradients and AdamW's moments, all fp32 (which is what the trainings keep), and the bytes that
a rank sends in a step for them. What is not: activations, buckets, the allocator's loss, and the codebook's statistics
(under 5 MB). tests/bench/test_zero_cost.py holds the calculation against runs of two ranks.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

BYTES = 4  # fp32
MOMENTS = 2  # of AdamW
STAGES = (0, 1, 2, 3)
GPUS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Cost:
    """Bytes on each rank: weights, gradients, moments and master stay until the step; passing comes and goes in it."""

    weights: float
    gradients: float
    moments: float
    master: float
    passing: float
    sent: float

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.moments + self.master + self.passing


def zero_cost(parameters: int, stage: int, ranks: int, accumulate: int = 1) -> Cost:
    """The cost of one step of a model of fp32 parameters under DeepSpeed's defaults.

    From stage 1 on a rank keeps its share of the moments and of the reduced gradient, and in stages 1 and 2 a copy of
    its share of the weights (``master``); in stage 3 its share of the weights is all it keeps. Passing: in stage 1 the
    rest of the gradient, until the backward pass has ended; in stage 3 all weights, from forward to backward, since
    models under stage3_max_reuse_distance (1e9 parameters) are gathered once.

    A ring's all-reduce of P bytes sends 2 P (n-1)/n, a reduce-scatter or all-gather half. Stage 0: an all-reduce of the
    gradient. 1: that, and an all-gather of the weights. 2: the all-reduce in every micro-batch (DeepSpeed's
    use_multi_rank_bucket_allreduce), and an all-gather. 3: an all-gather and a reduce-scatter in every micro-batch.
    """
    if stage not in STAGES or ranks < 1 or accumulate < 1:
        raise ValueError(f"stage must be 0 to 3, ranks and accumulate at least 1; got {stage}, {ranks}, {accumulate}")
    whole, share = parameters * BYTES, parameters * BYTES / ranks
    half_rings = {0: 2, 1: 3, 2: 2 * accumulate + 1, 3: 2 * accumulate}[stage]
    return Cost(
        weights=whole if stage < 3 else share,
        gradients=whole if stage == 0 else share,
        moments=MOMENTS * (whole if stage == 0 else share),
        master=share if stage in (1, 2) else 0.0,
        passing={1: whole - share, 3: whole}.get(stage, 0.0),
        sent=half_rings * whole * (ranks - 1) / ranks,
    )


def table(parameters: int, accumulate: int) -> str:
    kept = " | ".join(f"{name} GB" for name in ("weights", "gradients", "moments", "master", "passing", "peak"))
    lines = [f"| GPUs | ZeRO | {kept} | sent GB per step |", "|" + "---|" * 9]
    for ranks in GPUS:
        for stage in STAGES:
            c = zero_cost(parameters, stage, ranks, accumulate)
            numbers = (c.weights, c.gradients, c.moments, c.master, c.passing, c.peak, c.sent)
            lines.append(f"| {ranks} | {stage} | " + " | ".join(f"{n / 1e9:.2f}" for n in numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    import torch

    from beitv2_fast.config.presets import PRETRAIN
    from beitv2_fast.weights.build import build_student

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("base", "large"), default="large", help="of the pre-training [large]")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step [1]")
    arguments = parser.parse_args()
    with torch.device("meta"):
        student = build_student(PRETRAIN[arguments.preset], num_codes=8192)
    parameters = sum(p.numel() for p in student.parameters())
    print(f"Calculated, not measured: {arguments.preset}, {parameters / 1e6:.1f} M parameters, fp32\n")
    print(table(parameters, arguments.accumulate))


if __name__ == "__main__":
    main()
