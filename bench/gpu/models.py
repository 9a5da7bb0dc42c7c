"""Sections steps, profile, compiled and teacher: whole training steps beside the reference's structure."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beitv2_fast.config.presets import PRETRAIN, TOKENIZER
from beitv2_fast.config.training import TrainConfig
from beitv2_fast.teachers import create_teacher
from beitv2_fast.teachers.networks import CLIP_NAME
from bench import model_cost
from bench.gpu import clocks
from bench.gpu.run import Run
from bench.harness import DEVICE, OURS
from bench.profile_step import PARTS, seconds_by_part
from bench.training_steps import REFERENCE, STAGES, Step
from bench.training_steps import steps as training_steps

BF16 = torch.bfloat16
TINY_MODEL = {"dim": 48, "depth": 2, "heads": 3, "image_size": 64}
TINY_CODES = {"num_codes": 64, "decoder_depth": 1}


@dataclass(frozen=True)
class Shape:
    """A step to measure. A pre-training step includes the tokenizer (B/16) that makes its labels."""

    stage: str
    network: str
    batch: int

    @property
    def group(self) -> str:
        return f"{self.stage} {self.network}, {self.batch} images, bf16"

    def both(self, tiny: bool) -> dict[str, Step]:
        """Our step and the reference's structure's, by name."""
        pretrain = self.stage == "pre-training"
        config: TrainConfig = (PRETRAIN if pretrain else TOKENIZER)["large" if "L/16" in self.network else "base"]
        tokenizer = TOKENIZER["base"]
        if tiny:
            more = {"early_layer": 1, "num_masked": 6} if pretrain else TINY_CODES
            config, tokenizer = replace(config, **TINY_MODEL, **more), replace(tokenizer, **TINY_MODEL, **TINY_CODES)
        return training_steps(self.stage, self.batch, BF16, config, tokenizer if pretrain else None)


def shapes(tiny: bool) -> Iterator[Shape]:
    if tiny:
        yield from (Shape(stage, "tiny", 2) for stage in STAGES)
        return
    yield Shape("VQ-KD", "B/16", 256)
    yield Shape("pre-training", "L/16", 64)
    yield from (Shape("pre-training", "B/16", batch) for batch in (64, 256, 128))
    yield from (Shape("VQ-KD", "B/16", batch) for batch in (64, 128))


def steps(run: Run) -> None:
    for stage in STAGES if run.on_gpu else ():
        with run.item("host waits", group=stage):
            run.say("host waits", group=stage, count=host_waits(Shape(stage, "B/16", 64).both(run.tiny)[OURS]))
    for shape in shapes(run.tiny):
        about = {"group": shape.group, "images": shape.batch}
        with run.item("building", **about):
            run.need_time()
            both = shape.both(run.tiny)
            for name, step in both.items():
                _measure(run, name, step, about)
            del both, step
    if run.on_gpu:  # last, since a capture that fails may leave the process unfit for more
        with run.item("CUDA graph of a step"):
            run.need_time()
            step = Shape("pre-training", "B/16", 64).both(run.tiny)[OURS]
            times = clocks.all_times(step, seconds=0.3)
            run.tainted |= times.graph_error is not None
            run.say("CUDA graph of a step", group="pre-training B/16, 64 images, bf16", **times.numbers())


def host_waits(step: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a step, as torch reports it."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def _measure(run: Run, name: str, step: Callable[[], object], about: dict[str, Any]) -> None:
    """A step by the clocks, and images per second when steps follow one another."""
    with run.item(name, **about):
        run.need_time()
        started = time.perf_counter()
        step()
        clocks.wait()
        first = time.perf_counter() - started
        seconds = 0.02 if run.tiny else 0.6
        times = clocks.all_times(step, seconds=seconds, graph=False)
        each = clocks.pipelined(step, seconds)
        speed = round(1e3 * about["images"] / each, 1)
        run.say(name, **about, first_s=round(first, 2), pipelined_ms=round(each, 3), images_s=speed, **times.numbers())


def profile(run: Run) -> None:
    """By part of the network, with those of the reference's structure; and the kernels of our step."""
    for stage in STAGES:
        shape = Shape(stage, "tiny", 2) if run.tiny else Shape(stage, "B/16", 64)
        with run.item("parts", group=shape.group):
            run.need_time()
            both = shape.both(run.tiny)
            for name, step in both.items():
                found = seconds_by_part(step, stage)
                ms = {part: round(1e3 * found[part], 3) for part in PARTS if found[part]}
                run.say(name, group=shape.group, parts_ms=ms)
            times = clocks.kernel_times(both[OURS])
            busy, launches = sum(ms for ms, _ in times.values()), sum(n for _, n in times.values())
            run.say("all kernels", group=shape.group, ms=round(busy, 3), launches=launches)
            for kernel, (ms, count) in list(times.items())[: 5 if run.tiny else 40]:
                run.say(kernel[:120], group=shape.group, ms=round(ms, 4), launches=count)
            del both, step
    with run.item("model of the cost"):
        run.say("model of the cost", efficiency=model_cost.EFFICIENCY, predicted_ms=predicted_steps())


def predicted_steps() -> dict[str, float]:
    """bench.model_cost's step on an H100, by name; a model, not a measurement. Of 64 images."""
    return {
        name: round(1e3 * sum(part.seconds("H100") for part in parts), 2)
        for name, (parts, _) in model_cost.shapes().items()
    }


def compiled(run: Run) -> None:
    """torch.compile of the model in place; tiny, its graphs are run without compiling them."""
    for stage in reversed(STAGES):
        shape = Shape(stage, "tiny", 2) if run.tiny else Shape(stage, "B/16", 64)
        for name in (OURS, REFERENCE):
            with run.item(name, group=f"{shape.group}, torch.compile"):
                run.need_time()
                step = shape.both(run.tiny)[name]
                step.model.compile(backend="eager" if run.tiny else "inductor")
                _measure(run, name, step, {"group": f"{shape.group}, torch.compile", "images": shape.batch})
                del step


def teacher(run: Run) -> None:
    """CLIP's ViT-B/16 as a training runs it, from a file of random weights."""
    grid, batch = (14, 14), 2 if run.tiny else 256
    if run.tiny:
        return run.say("CLIP B/16, forward", skipped="needs a GPU: a ViT-B/16 is not tiny")
    with run.item("CLIP B/16, forward"), tempfile.TemporaryDirectory() as folder:
        import open_clip

        file = Path(folder) / "clip.pt"
        torch.save(open_clip.create_model(CLIP_NAME).state_dict(), file)
        network = create_teacher("clip", grid, str(file), dtype=BF16).to(DEVICE)
        images = torch.rand(batch, 3, 224, 224, device=DEVICE)
        run.time_call("CLIP B/16, forward", partial(network, images, grid), images=batch, seconds=0.5)
