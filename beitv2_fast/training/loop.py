"""The one training loop: every stage of BEiT v2 is a Task that it drives.

All randomness is a function of (seed, step) or (seed, epoch, sample), so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..config.training import TrainConfig
from ..data.images import ImageFolder
from ..data.loaders import train_loader
from ..data.torch_loader import deaths_explained
from ..distributed import World, autocast_dtype
from ..runs.checkpoints import Checkpoints
from ..runs.folder import RunFolder
from .capture import CapturedStep, captures
from .deepspeed import DeepSpeedBackend
from .ema import ModelEMA
from .launch import Backend
from .monitor import BadSteps, HostCopy, OnAnyRank, StopSignal, TrainingLog, Undo, Watchdog, learns_late, poisoned
from .optim import Schedule, TorchBackend, parameter_groups
from .resume import resume, save, save_best
from .task import ON_HOST, AfterEpoch, Batch, Task

PRECISION_NAMES = {None: "fp32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast"}


def train(
    task: Task,
    config: TrainConfig,
    dataset: ImageFolder,
    run: RunFolder,
    world: World,
    backend_class: Backend,
    *,
    layer_decay: float = 1.0,
    ema_decay: float = 0.0,
    after_epoch: AfterEpoch | None = None,
    every_epochs: int = 1,
    schedule: Schedule | None = None,
) -> int:
    """Train to the end, or until a signal. Returns the exit code: 0, or 128 + the signal's number after saving.

    Args:
        layer_decay: see ``parameter_groups``.
        ema_decay: above 0: a ``ModelEMA`` follows the weights, and lies in the checkpoints as ema.safetensors.
        after_epoch: called with the models "weights" and, if there is one, "average", before the epoch is saved: after
            every ``every_epochs``-th and the last.
        schedule: of steps and learning rates; None: what the config says.
    """
    schedule = schedule or Schedule.of(config, len(dataset), world.size)
    task.model.to(world.device).train()
    checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints)
    ema = ModelEMA(task.model, ema_decay) if ema_decay else None
    about, optimizer_state = resume(checkpoints, task.model, ema, schedule, dataset, run, world)
    step = about["step"]
    groups = parameter_groups(task.model, config.weight_decay, layer_decay=layer_decay)
    backend = backend_class(task.model, groups, config, world)
    if step:
        backend.restore(optimizer_state)
    del optimizer_state
    amp = autocast_dtype(config.precision, world.device)
    log = TrainingLog(task, run, world, schedule, config, step)
    how = backend.name + ", CUDA graph" * captures(config)
    parameters = sum(p.numel() for group in groups for p in group["params"])
    log.opening(len(dataset), parameters, PRECISION_NAMES[amp], how)
    if step >= schedule.total_steps:
        run.print(f"{task.name}: already complete")
        return 0

    loader = train_loader(
        dataset,
        batch_size=config.batch_size * config.accumulate,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        start_step=step,
        total_steps=schedule.total_steps,
        workers=config.workers,
    )
    bad = BadSteps(run, world, config.stop_after_bad, about["skipped_steps"], dataset.images.paths)
    undo, any_rank, saves = Undo(task.model), OnAnyRank(world), Saves(config, world, step)
    watchdog = Watchdog(run.path, world.rank, config.hang_after)
    known = Known(bad, undo, log, lambda step: ema and ema.update(task.model, step, backend.whole))

    def take(batch: Batch, step: int | None, lr: float | Tensor) -> dict[str, Tensor]:
        undo.keep()
        metrics = gradient(task, backend, batch, config, step, world, amp)
        known.learn()  # what the step before came to; from here on its weights are gone
        norm = backend.step(lr)
        undo.back(norm)
        return {**metrics, "grad_norm": norm}

    take_step: Callable[[Batch, int, float], dict[str, Tensor]] = take
    if captures(config):
        seed = functools.partial(_mix, config.seed, lane=0)
        take_step = CapturedStep(take, known, task.inputs, seed, backend.optimizer, world.device)
    with StopSignal() as stop, log, watchdog, deaths_explained():
        for batch in loader:
            lr = schedule.lr(step)
            schedule.set_weight_decay(backend.optimizer, step)
            metrics = take_step(batch, step, lr)
            known.learn()  # of the step before a captured one, which is on its way
            step += 1
            known.add(step, lr, metrics, batch)
            if not learns_late(world.device) or log.pictures_due(step):
                known.learn()
            stopping, timed = any_rank(stop.received is not None, saves.time_has_come())
            ends = step == schedule.total_steps
            epoch = schedule.ended_epoch(step)
            evaluates = after_epoch is not None and (ends or (epoch and epoch % every_epochs == 0 and not stopping))
            due = saves.due(step, epoch, stopping or timed or ends)
            if evaluates or due:
                known.learn()
            if after_epoch is not None and evaluates:
                models = {"weights": backend.wrapped, **({"average": ema.model} if ema else {})}
                after_epoch(step, models, watchdog.progress)
                if name := getattr(after_epoch, "best", None):
                    save_best(run.path / "best", name, backend, ema, step, world)
            if due and not bad.in_a_row:  # among bad steps the weights are suspect
                about = {"images_per_step": schedule.images_per_step, "skipped_steps": bad.skipped}
                of_images = {"images": dataset.images.fingerprint, "image_count": len(dataset)}
                save(checkpoints, backend, ema, step, world, milestone=saves.milestone, **of_images, **about)
                saves.done(step)
            watchdog.progress()
            if stopping and not ends:
                saved = saves.last
                said = "saved" if saved == step else f"after bad steps, so the checkpoint of step {saved} remains"
                run.print(f"{task.name}: stopped at step {step}, {said}; the same command resumes")
                return 128 + (stop.received or signal.SIGTERM)
        if bad.in_a_row:
            bad.stop(step)
    run.print(f"{task.name}: done, {log.elapsed()}; checkpoint {checkpoints.finished(step)}")
    return 0


class Saves:
    """After which steps a checkpoint is saved, and which of them stays for good (``milestone``).

    What is due stays so until it is done: among bad steps nothing is saved.
    """

    def __init__(self, config: TrainConfig, world: World, step: int):
        self.config, self.last, self.began = config, step, time.monotonic()
        self.seconds = 0.0 if config.save_every or world.rank else 60 * config.save_every_minutes
        self.wanted = self.milestone = False

    def time_has_come(self) -> bool:
        """On rank 0, whose clock rules: once whenever --save-every-minutes have passed."""
        if not self.seconds or time.monotonic() < self.began + self.seconds:
            return False
        self.began = time.monotonic()
        return True

    def due(self, step: int, epoch: int, now: bool) -> bool:
        """After a step. epoch: that which ended in it, 0 for none. now: for another reason than the options'."""
        steps, epochs, keep = self.config.save_every, self.config.save_every_epochs, self.config.keep_every
        self.milestone |= bool(keep and epoch) and epoch % keep == 0
        if steps:
            now |= step - self.last >= steps - self.last % steps
        elif epochs and epoch:
            now |= epoch % epochs == 0
        self.wanted |= now or self.milestone
        return self.wanted

    def done(self, step: int) -> None:
        self.last, self.wanted, self.milestone = step, False, False


class Known:
    """The newest step until the host knows whether it counts: its numbers are on their way from the device."""

    def __init__(self, bad: BadSteps, undo: Undo, log: TrainingLog, follow: Callable[[int], object]):
        self.bad, self.undo, self.log, self.follow = bad, undo, log, follow
        self.waiting: tuple[int, float, list[str], HostCopy, Batch] | None = None

    def add(self, step: int, lr: float, metrics: dict[str, Tensor], batch: Batch) -> None:
        """``metrics`` are scalars on the device, "loss" and "grad_norm" among them."""
        self.log.ask(step)
        device = metrics["loss"].device
        numbers = torch.stack([v.to(device, torch.float64, non_blocking=True) for v in metrics.values()])
        self.waiting = step, lr, list(metrics), HostCopy(numbers), batch

    def learn(self) -> None:
        """Read its numbers, if it was not done yet: the average and the log follow, or it is told as a bad one.

        No optimizer's step may have come since.
        """
        if self.waiting is None:
            return
        (step, lr, names, numbers, batch), self.waiting = self.waiting, None
        metrics = dict(zip(names, numbers.read(), strict=True))
        if math.isfinite(metrics["grad_norm"]):
            self.bad.good()
            self.follow(step)
            self.log.add(step, lr, metrics, batch)
        else:
            self.undo.tell()
            self.log.add(step, lr, {}, batch)
            self.bad.bad(step, metrics["loss"], metrics["grad_norm"], batch, metrics.get("loss_scale", 1.0))


def gradient(
    task: Task,
    backend: TorchBackend | DeepSpeedBackend,
    batch: Batch,
    config: TrainConfig,
    step: int | None,
    world: World,
    amp: torch.dtype | None,
) -> dict[str, Tensor]:
    """Forward and backward of the step's micro-batches; the mean of the loss and of the metrics over them, and the
    loss scale if there is one.

    ``step`` seeds torch's generators; None: they are seeded.
    """
    slices = [slice(i * config.batch_size, (i + 1) * config.batch_size) for i in range(config.accumulate)]
    batch = {name: v if name in ON_HOST else v.to(world.device, non_blocking=True) for name, v in batch.items()}
    parts = [{name: v[s] for name, v in batch.items()} for s in slices]
    sums = torch.zeros((), dtype=torch.float64, device=world.device)
    with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
        if step == 0 and len(parts) > 1:
            task.prepare(parts)
    for i, part in enumerate(parts):
        if step is not None:
            # As many micro-batches as there are ranks draw the same numbers as the ranks would.
            torch.manual_seed(_mix(config.seed, step, world.rank * len(parts) + i))
        last = i + 1 == len(parts)
        with backend.micro_batch(last):
            with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
                loss, metrics = task.loss(backend.wrapped, part)
            backend.backward(poisoned(loss), last)
        metrics = {"loss": loss, **metrics}
        sums = sums + torch.stack([v.detach() for v in metrics.values()]).double() / len(parts)
    return {**dict(zip(metrics, sums, strict=True)), **backend.scale.numbers()}


def _mix(seed: int, step: int, lane: int) -> int:
    """A seed for torch's generators in one micro-batch of a step."""
    return (seed * 1_000_003 + step) * 4_099 + lane
