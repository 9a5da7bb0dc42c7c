"""Section learn: from photographs to probes in the minutes there are, with the steps of train.downstream.

A ViT of about S size (12 blocks of width 384, 64 patches of 8 pixels) on packed photographs (``--data``), in three
phases: the tokenizer, the two students, and everything that judges them. The students get as many epochs as the time
then left allows; what is cut short is judged as it is. All runs stay beside the photographs (``runs_of``), and a later
call goes on with what is not done.

Two trainings run at once, and all judges. On an H200 three at once took 5,000, 5,700 and 7,100 images/s (student,
student without aggregation, fine-tuning), which is all that the GPU gives if a step of B/16 is scaled to this size
(13,900, 15,600 or 20,900 alone): one at a time could be no faster, and would wait for its host besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beitv2_fast.train.experiments import downstream
from beitv2_fast.train.experiments.packed_images import unpacked
from beitv2_fast.train.experiments.runner import Step, is_done, read_record, record_file, run_steps
from beitv2_fast.train.experiments.stages import SmallScale, Stages
from bench.gpu.run import Run

SCALE = SmallScale(
    image_size=64, patch_size=8, dim=384, depth=12, heads=6, num_codes=1024, early_layer=9, probe_epochs=30,
    batch_size=512, jobs=2,
)  # fmt: skip
TINY_SCALE = SmallScale(
    image_size=32, patch_size=8, dim=24, depth=2, heads=2, num_codes=16, early_layer=1, tokenizer_epochs=1,
    pretrain_epochs=1, finetune_epochs=1, probe_epochs=1, batch_size=8, quality_images=8, jobs=1, loader="gpu",
)  # fmt: skip
# Of the section's time, with 40,000 photographs on an H200, where an epoch took 7 s and a training 25 s to start; the
# students then get about three times the tokenizer's epochs, as in the paper.
EPOCHS_PER_MINUTE = {"tokenizer_epochs": 1.4, "finetune_epochs": 0.7}
STUDENT_RATE = 6000.0  # images/s of each of two
STUDENT_START = 25.0  # seconds
JUDGES, JUDGES_EPOCH = 60.0, 8.0  # seconds of all of them at once, and for each epoch of the fine-tunings
END = 15.0  # seconds for what runs to save, and for the tables
CURVE = 20  # points of a training's log that its result keeps


def learn(run: Run) -> None:
    with runs_of(run) as root:
        data, runs = _images(run, root), root / "runs"
        if data is None:
            return
        scale = TINY_SCALE if run.tiny else scale_of(root, run.left())
        tokenizer, students, judges = phases_of(runs, data, scale, tiny=run.tiny)
        forget_early_judgments(runs, [*tokenizer, *students], judges)

        def tell() -> None:
            say_tables(run, runs, scale, [*tokenizer, *students, *judges])

        last = threading.Timer(run.left() - 3, tell)  # should a step not stop, what is done is said all the same
        last.daemon = True
        last.start()
        reserved = END if run.tiny else END + JUDGES + JUDGES_EPOCH * scale.finetune_epochs
        run_until(run.left() - reserved, tokenizer, runs, scale.jobs)
        if is_done(runs, tokenizer[0]):
            if not run.tiny:
                scale = scale_of(root, run.left() - reserved, sum(1 for _ in (data / "train").glob("*/*")))
                _, students, judges = phases_of(runs, data, scale)
            run_until(run.left() - reserved, [*tokenizer, *students], runs, scale.jobs)
        ready = [dataclasses.replace(step, needs=()) for step in judges if has_weights(runs, step.needs)]
        run_until(run.left() - END, ready, runs, len(ready))
        last.cancel()
        tell()


@contextlib.contextmanager
def runs_of(run: Run) -> Iterator[Path]:
    """The folder of the runs: beside the photographs; without any, one that goes when the section ends."""
    if run.data is not None:
        yield run.data.with_name(f"{run.data.stem}_{'tiny' if run.tiny else 'learned'}")
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


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


def scale_of(root: Path, seconds: float, images: int | None = None) -> SmallScale:
    """With as many epochs as fit, but those that runs in this folder have begun with. images: that the students see in
    each epoch, for so many seconds."""
    file = root / "epochs.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    found = {field: max(1, round(rate * seconds / 60)) for field, rate in EPOCHS_PER_MINUTE.items()}
    if images is not None:
        found["pretrain_epochs"] = max(1, int((seconds - STUDENT_START) * STUDENT_RATE / images))
    found |= known
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return dataclasses.replace(SCALE, workers=max((os.cpu_count() or 2) // 4 - 1, 1), **found)


def has_weights(runs: Path, names: Sequence[str]) -> bool:
    return all(any((runs / name).glob("checkpoints/step_*")) for name in names)


def forget_early_judgments(runs: Path, trainings: Sequence[Step], judges: Sequence[Step]) -> None:
    """Those of trainings that were cut short, and go on now."""
    cut = {step.name for step in trainings if not is_done(runs, step)}
    for step in judges:
        if cut.intersection(step.needs):
            record_file(runs, step.name).unlink(missing_ok=True)
            shutil.rmtree(runs / step.name, ignore_errors=True)


def stages_of(root: Path, data: Path, scale: SmallScale) -> Stages:
    return Stages(root.resolve(), data.resolve(), scale)


def phases_of(runs: Path, data: Path, scale: SmallScale, *, tiny: bool = False) -> tuple[list[Step], ...]:
    """(tokenizer, students, judges), under the names of train.downstream, so that its tables are made of them."""
    stages, at = stages_of(runs, data, scale), "seed0"
    run = {row: f"{at}/{row}" for row in ("tokenizer", "pretrain", "pretrain_plain")}
    students = {"layer_scale": 0.1, **_long(scale, scale.pretrain_epochs)}
    tuned = {"layer_scale": 0.1, **_long(scale, scale.finetune_epochs)}
    teacher = {"teacher_image_size": 128 if tiny else 256}  # 32 pixels a feature: as many as there are patches
    if tiny:
        return (
            [stages.tokenizer(run["tokenizer"], 0, **teacher)],
            [stages.pretrain(run["pretrain"], run["tokenizer"], 0, **students)],
            [stages.probe(f"{at}/probe_pretrain", run["pretrain"], 0)],
        )

    def finetune(row: str) -> Step:
        # Random weights have no layers that are to be spared.
        decay = 0.8 if row in run else 1.0
        return stages.finetune(f"{at}/finetune_{row}", run.get(row), 0, **tuned, layer_decay=decay)

    return (
        [
            stages.tokenizer(run["tokenizer"], 0, **teacher, **_long(scale, scale.tokenizer_epochs)),
            finetune("random"),
        ],
        [
            stages.pretrain(run["pretrain"], run["tokenizer"], 0, **students),
            stages.pretrain(run["pretrain_plain"], run["tokenizer"], 0, aggregation_depth=0, **students),
        ],
        [
            *(finetune(row) for row in run),
            *(stages.probe(f"{at}/probe_{row}", run[row], 0) for row in run),
            stages.probe(f"{at}/probe_random", run["pretrain"], 0, "untrained"),
            stages.quality(f"{at}/tokenizer_quality", run["tokenizer"]),
        ],
    )


def _long(scale: SmallScale, epochs: int) -> dict[str, Any]:
    """Options of a training that is longer than the small scale's, with larger batches and a deeper network: a learning
    rate that is meant for them, a longer warm-up, the paper's initial weights, few checkpoints."""
    warmup = max(1, epochs // 20)
    return {"lr_batch": scale.batch_size, "warmup_epochs": warmup, "init_std": 0.02, "save_every": 2000}


def run_until(seconds: float, steps: Sequence[Step], root: Path, jobs: int) -> None:
    """Run the steps for so long; those that run then are told to stop, as by Ctrl-C."""
    alarm = threading.Timer(max(seconds, 1.0), os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try:
        run_steps(steps, root, jobs=jobs, say=lambda text: print(text, file=sys.stderr, flush=True))
    finally:
        alarm.cancel()


def say_tables(run: Run, runs: Path, scale: SmallScale, steps: Sequence[Step]) -> None:
    """The tables of train.downstream, of what is done, and how each step went."""
    tokenizers, backbones = downstream.tables_of(runs, 1)
    for table, rows in (("tokenizer", tokenizers), ("backbones", backbones)):
        for name, numbers in rows.items():
            run.say(name, table=table, **{key: values[0] for key, values in numbers.items()})
    run.say("orderings", lines=downstream.orderings(backbones))
    run.say("plan", scale=dataclasses.asdict(scale))
    for step in steps:
        found: dict[str, Any] = {"attempts": read_record(runs, step)["attempts"]}
        if (file := runs / step.name / "metrics.jsonl").is_file():
            log = [json.loads(line) for line in file.read_text().splitlines()]
            found["curve"] = [*log[:: -(-len(log) // CURVE)], *log[-1:]]
        if not is_done(runs, step):
            log = runs / "logs" / f"{step.name}.txt"
            found["error"] = log.read_text(errors="replace")[-1200:] if log.is_file() else "not begun"
        run.say(step.name, **found)
