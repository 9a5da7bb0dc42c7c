"""Where the time of a training step goes, ours and in the reference's structure: `python -m bench.profile_step`.

torch.profiler times every op of one step after a warm-up; an op's own time counts for the part that its name, its
shapes and what called it say. The teacher, which a VQ-KD step without kept features runs too, is timed by itself.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from beitv2_fast.distributed import autocast_dtype
from bench.harness import DEVICE, OURS
from bench.training_steps import NUM_CODES, PRECISIONS, STAGES, Step, steps

OPTIMIZER = "bench: optimizer"
PARTS = (
    "linear layers", "attention", "norms, GELU", "patch embedding", "head", "quantizer", "optimizer",
    "sums, copies, other",
)  # fmt: skip
BY_NAME = (  # the first that fits an op's name counts
    ("attention", ("attention", "bmm", "softmax")),
    ("norms, GELU", ("layer_norm", "gelu")),
    ("patch embedding", ("conv",)),
    ("linear layers", ("addmm", "aten::mm", "linear")),
)
BY_CALLER = (  # whatever the op's own name: what it works for
    ("optimizer", (OPTIMIZER,)),
    ("head", ("masked_cross_entropy",)),
    ("quantizer", ("codebook", "vector_quantize", "dead_codes", "one_hot")),
    ("attention", ("beitv2_fast::attention",)),
)


def part_of(event: Any, stage: str) -> str:
    """The part of a step that an op's own time belongs to."""
    callers = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        callers.append(parent.name)
        parent = parent.cpu_parent
    for part, names in BY_CALLER:
        if any(name in caller for name in names for caller in callers):
            return part
    if any(NUM_CODES in shape for shape in event.input_shapes or [] if isinstance(shape, list)):
        return "head" if stage == "pre-training" else "quantizer"
    for part, names in BY_NAME:
        if any(name in event.name for name in names):
            return part
    linear = any("_Linear" in caller for caller in callers)
    return "linear layers" if linear else "sums, copies, other"


def step_in_parts(step: Step) -> None:
    step.forward().backward()
    with record_function(OPTIMIZER):
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.clip or float("inf"))
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)


def seconds_by_part(step: Step, stage: str) -> Counter[str]:
    """Seconds of one step's ops, by part; on the CPU each part's share of the step's processor time.

    The profiler's own clock is the wall's, which other processes of the machine stretch.
    """
    step_in_parts(step)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        started = time.process_time()
        step_in_parts(step)
        processor = time.process_time() - started
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is that of the op which launched it
        own = event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
        found[part_of(event, stage)] += own / 1e6
    if DEVICE.type == "cpu":
        total = sum(found.values())
        found = Counter({part: processor * seconds / total for part, seconds in found.items()})
    return found


def teacher_seconds(batch: int, dtype: torch.dtype | None) -> float | None:
    """Processor seconds of CLIP B/16's forward (random weights) as a training runs it; None without open_clip."""
    dtype = dtype and autocast_dtype("auto", DEVICE)  # in bf16 only where that is faster
    try:
        import open_clip
    except ImportError:
        return None
    visual = open_clip.create_model("ViT-B-16-quickgelu").visual.eval().to(DEVICE)
    images = torch.rand(batch, 3, 224, 224, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None):
        visual(images)
        started = time.process_time()
        visual(images)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="of the networks; by default both")
    parser.add_argument("--stage", choices=list(STAGES), help="by default both")
    args = parser.parse_args()
    for stage in [args.stage] if args.stage else STAGES:
        for precision in [args.precision] if args.precision else PRECISIONS:
            both = steps(stage, args.batch, PRECISIONS[precision])
            found = {name: seconds_by_part(step, stage) for name, step in both.items()}
            totals = {name: sum(parts.values()) for name, parts in found.items()}
            print(f"\n{stage}, {precision}, B/16, batch {args.batch}, {torch.get_num_threads()} threads\n")
            print("| part | ours ms | share | reference's structure ms | share |\n|---|---|---|---|---|")
            for part in (*PARTS, "all"):
                row = [(totals[n] if part == "all" else found[n][part], totals[n]) for n in found]
                if any(value for value, _ in row):
                    cells = " | ".join(f"{1e3 * value:.0f} | {value / total:.0%}" for value, total in row)
                    print(f"| {part} | {cells} |")
            if stage == "VQ-KD" and (teacher := teacher_seconds(args.batch, PRECISIONS[precision])):
                share = teacher / (teacher + totals[OURS])
                print(
                    f"\nTeacher (CLIP B/16, forward), beside it: {1e3 * teacher:.0f} ms, {share:.0%} of a step with it."
                )


if __name__ == "__main__":
    main()
