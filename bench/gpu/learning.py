"""Section learn: from photographs to probes in the minutes there are, with the steps of train.downstream.

A ViT of about S size (12 blocks of width 384, 64 patches of 8 pixels) on packed photographs (``--data``). The epochs
are estimated from what a step took on an H100. What is done when the time ends stands in the table, so the most
important comes first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beitv2_fast.train.experiments import downstream
from beitv2_fast.train.experiments.packed_images import unpacked
from beitv2_fast.train.experiments.runner import Step, read_record, run_steps
from beitv2_fast.train.experiments.stages import SmallScale, Stages
from bench.gpu.run import Run

SCALE = SmallScale(
    image_size=64, patch_size=8, dim=384, depth=12, heads=6, num_codes=1024, early_layer=9, tokenizer_epochs=50,
    pretrain_epochs=200, finetune_epochs=20, probe_epochs=30, batch_size=512, jobs=2,
)  # fmt: skip
TINY_SCALE = SmallScale(
    image_size=32, patch_size=8, dim=24, depth=2, heads=2, num_codes=16, early_layer=1, tokenizer_epochs=1,
    pretrain_epochs=1, finetune_epochs=1, probe_epochs=1, batch_size=8, quality_images=8, jobs=1, loader="gpu",
)  # fmt: skip
# Of the section's time, with 40,000 photographs on an H100: what is left over is for the starts and the judges.
EPOCHS_PER_MINUTE = {"tokenizer_epochs": 2.5, "pretrain_epochs": 6.0, "finetune_epochs": 1.5}
CURVE = 20  # points of a training's log that its result keeps


def learn(run: Run) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = _images(run, root)
        if data is None:
            return
        scale = _workers(TINY_SCALE if run.tiny else fitting_scale(run.left()))
        steps = steps_of(root / "runs", data, scale, tiny=run.tiny)
        run.say("plan", scale=dataclasses.asdict(scale), steps=[step.name for step in steps])
        outcome = run_until(run.left() - 10, steps, root / "runs", scale.steps_at_once)
        say_tables(run, root / "runs", steps, outcome)


def _images(run: Run, root: Path) -> Path | None:
    if run.data is not None:
        return unpacked(run.data, root / "images")
    if not run.tiny:
        return run.say(
            "learn", skipped="no photographs: give --data FILE.npz or a folder with train/CLASS and val/CLASS"
        )
    command = [sys.executable, "-m", "bench.gpu.pictures", str(root / "images"), "120"]
    run.command("pictures", command, limit=60)
    return root / "images"


def _workers(scale: SmallScale) -> SmallScale:
    """The cores, shared by the steps that run at once."""
    cores = (os.cpu_count() or 2) - 2
    return dataclasses.replace(scale, workers=0 if scale is TINY_SCALE else max(cores // max(scale.jobs, 1), 1))


def fitting_scale(seconds: float) -> SmallScale:
    """With as many epochs as fit."""
    epochs = {
        field: max(1, min(round(rate * seconds / 60), getattr(SCALE, field)))
        for field, rate in EPOCHS_PER_MINUTE.items()
    }
    return dataclasses.replace(SCALE, **epochs)


def stages_of(root: Path, data: Path, scale: SmallScale) -> Stages:
    return Stages(root.resolve(), data.resolve(), scale)


def steps_of(root: Path, data: Path, scale: SmallScale, *, tiny: bool = False) -> list[Step]:
    """Under the names of train.downstream, so that its tables are made of them; the most important ones first."""
    stages, at = stages_of(root, data, scale), "seed0"
    run = {row: f"{at}/{row}" for row in ("tokenizer", "pretrain", "pretrain_plain")}
    students = {"layer_scale": 0.1, **_long(scale, scale.pretrain_epochs)}
    tuned = {"layer_scale": 0.1, **_long(scale, scale.finetune_epochs)}
    teacher = {"teacher_image_size": 128 if tiny else 256}  # 32 pixels a feature: as many as there are patches
    if tiny:
        return [
            stages.tokenizer(run["tokenizer"], 0, **teacher),
            stages.pretrain(run["pretrain"], run["tokenizer"], 0, **students),
            stages.probe(f"{at}/probe_pretrain", run["pretrain"], 0),
        ]
    return [
        stages.tokenizer(run["tokenizer"], 0, **teacher, **_long(scale, scale.tokenizer_epochs)),
        stages.pretrain(run["pretrain"], run["tokenizer"], 0, **students),
        stages.pretrain(run["pretrain_plain"], run["tokenizer"], 0, aggregation_depth=0, **students),
        *(stages.probe(f"{at}/probe_{row}", run[row], 0) for row in run),
        stages.probe(f"{at}/probe_random", run["pretrain"], 0, "untrained"),
        stages.quality(f"{at}/tokenizer_quality", run["tokenizer"]),
        *(
            # Random weights have no layers that are to be spared.
            stages.finetune(f"{at}/finetune_{row}", run.get(row), 0, **tuned, layer_decay=0.8 if row in run else 1.0)
            for row in ("pretrain", "random", "tokenizer", "pretrain_plain")
        ),
    ]


def _long(scale: SmallScale, epochs: int) -> dict[str, Any]:
    """Options of a training that is longer than the small scale's, with larger batches and a deeper network: a learning
    rate that is meant for them, a longer warm-up, the paper's initial weights, few checkpoints."""
    warmup = max(1, epochs // 20)
    return {"lr_batch": scale.batch_size, "warmup_epochs": warmup, "init_std": 0.02, "save_every": 2000}


def run_until(seconds: float, steps: Sequence[Step], root: Path, jobs: int) -> Any:
    """Run the steps for so long; those that run then are told to stop, as by Ctrl-C."""
    alarm = threading.Timer(max(seconds, 1.0), os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try:
        return run_steps(steps, root, jobs=jobs, say=lambda text: print(text, file=sys.stderr, flush=True))
    finally:
        alarm.cancel()


def say_tables(run: Run, root: Path, steps: Sequence[Step], outcome: Any) -> None:
    """The tables of train.downstream, of what is done."""
    tokenizers, backbones = downstream.tables_of(root, 1)
    for name, numbers in tokenizers.items():
        run.say(name, table="tokenizer", **{key: values[0] for key, values in numbers.items()})
    for name, numbers in backbones.items():
        run.say(name, table="backbones", **{key: values[0] for key, values in numbers.items()})
    run.say("orderings", lines=downstream.orderings(backbones))
    for step in steps:
        if (file := root / step.name / "metrics.jsonl").is_file():
            log = [json.loads(line) for line in file.read_text().splitlines()]
            run.say(step.name, curve=[*log[:: -(-len(log) // CURVE)], *log[-1:]])
    seconds = {step.name: read_record(root, step)["attempts"] for step in steps}
    run.say("steps", done=outcome.done, failed=outcome.failed, left=outcome.left, attempts=seconds)
    for name in outcome.failed:
        log = root / "logs" / f"{name}.txt"
        run.say(name, error=log.read_text(errors="replace")[-1200:] if log.is_file() else "no log")
