"""The one training loop: every stage of BEiT v2 is a Task that it drives.

All randomness is a function of (seed, step) or (seed, epoch, sample), so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import choose_attention
from .backend import DeepSpeedBackend, TorchBackend
from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import ImageFolder, ImageList, check_images, find_images, steps_per_epoch, train_loader
from .distributed import World, autocast_dtype
from .errors import UserError
from .optim import cosine_schedule, parameter_groups
from .run import RunFolder
from .transforms import View

Batch = dict[str, Tensor]


class Task(Protocol):
    """What a stage brings: its model, what a step does with a batch, what it tells the log."""

    name: str
    model: nn.Module

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and scalars for the log. ``model`` is the wrapped model: call it, not ``self.model``."""

    def report(self) -> dict[str, float]:
        """Further numbers over the window since the last line of the log."""

    def line(self, metrics: dict[str, float]) -> str:
        """The stage's part of a console line."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures [3, H, W] in [0, 1] for TensorBoard."""


@dataclass(frozen=True)
class Plan:
    """Steps and learning rate of a training."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    @classmethod
    def of(cls, config: TrainConfig, num_images: int, world_size: int) -> Plan:
        per_epoch = steps_per_epoch(num_images, config.batch_size, world_size)
        peak = config.lr * config.batch_size * world_size / config.lr_batch
        total = per_epoch * config.epochs
        return cls(per_epoch, total, min(round(per_epoch * config.warmup_epochs), total), peak, config.min_lr)

    def lr(self, step: int) -> float:
        return cosine_schedule(
            step,
            peak=self.peak_lr,
            final=min(self.min_lr, self.peak_lr),
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
        )


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; a second Ctrl-C is obeyed at once.

    A second SIGTERM is not: launchers pass on what their process group has already got, and would end the save.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def training_images(config: TrainConfig, view: View, run: RunFolder, world: World) -> ImageFolder:
    """The images of --data, checked once: rank 0 decodes them all, the others read what it wrote beside the run."""

    def checked() -> ImageList:
        found = find_images(config.data, "train")
        cache = run.path / "images.json"
        return check_images(found, cache=cache, min_size=config.patch_size, workers=config.workers)

    if world.rank == 0:
        images = checked()
    world.barrier()
    if world.rank != 0:
        images = checked()
    return ImageFolder(images, view, config.seed, in_memory=config.in_memory)


def train(
    task: Task,
    config: TrainConfig,
    dataset: ImageFolder,
    run: RunFolder,
    world: World,
    *,
    deepspeed: bool = False,
    no_decay: Sequence[str] = (),
) -> int:
    """Train to the end, or until a signal. Returns the exit code: 0, or 128 + the signal's number after saving."""
    plan = Plan.of(config, len(dataset), world.size)
    task.model.to(world.device).train()
    groups = parameter_groups(task.model, config.weight_decay, skip=no_decay)
    backend = (DeepSpeedBackend if deepspeed else TorchBackend)(task.model, groups, config, world)
    checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints)
    step = checkpoints.latest(backend.load, run.print)
    amp = autocast_dtype(config.precision, world.device)
    parameters = sum(p.numel() for p in task.model.parameters())
    run.print(
        f"{task.name}: {len(dataset):,} images, {plan.steps_per_epoch} steps an epoch, {plan.total_steps:,} steps; "
        f"{parameters / 1e6:.1f} M parameters; {world.size} x {world.device.type}, "
        f"{'bf16 autocast' if amp else 'fp32'}, {'DeepSpeed' if deepspeed else 'torch'}, "
        f"attention {choose_attention(config.attention, world.device.type)}, lr {plan.peak_lr:.2e}"
    )
    if step:
        run.print(f"{task.name}: resumed at step {step} of {plan.total_steps}")
    if step >= plan.total_steps:
        run.print(f"{task.name}: already complete")
        return 0

    loader = train_loader(
        dataset,
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        start_step=step,
        total_steps=plan.total_steps,
        workers=config.workers,
    )
    log = _Log(task, run, world, plan, config, step)
    with StopSignal() as stop, log:
        for batch in loader:
            batch = {name: value.to(world.device, non_blocking=True) for name, value in batch.items()}
            torch.manual_seed(_mix(config.seed, step, world.rank))
            with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
                loss, metrics = task.loss(backend.wrapped, batch)
            lr = plan.lr(step)
            metrics["grad_norm"] = backend.step(loss, lr)
            step += 1
            log.add(step, lr, {"loss": loss, **metrics}, batch)
            stopping = world.any(stop.received is not None)
            if stopping or step % config.save_every == 0 or step == plan.total_steps:
                _save(checkpoints, backend, step, world)
            if stopping and step < plan.total_steps:
                run.print(f"{task.name}: stopped at step {step}, saved; the same command resumes")
                return 128 + (stop.received or signal.SIGTERM)
    run.print(f"{task.name}: done, {log.elapsed()}; checkpoint {checkpoints.finished(step)}")
    return 0


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed for torch's generators in one step of one rank."""
    return (seed * 1_000_003 + step) * 4_099 + rank


def _save(checkpoints: Checkpoints, backend: TorchBackend | DeepSpeedBackend, step: int, world: World) -> None:
    try:
        if world.rank == 0:
            checkpoints.begin(step)
        world.barrier()
        backend.save(checkpoints.unfinished(step), world)
        world.barrier()
        if world.rank == 0:
            checkpoints.commit(step)
    except (OSError, RuntimeError) as error:  # torch.save tells a full disk as a RuntimeError
        raise UserError(
            f"the checkpoint of step {step} could not be written: {error}. The one before it is intact; "
            "make room and start the same command again."
        ) from error


class _Log:
    """Means over the steps since the last line, the progress bar, pictures now and then."""

    def __init__(self, task: Task, run: RunFolder, world: World, plan: Plan, config: TrainConfig, step: int):
        self.task, self.run, self.world, self.plan, self.config = task, run, world, plan, config
        self.start_step, self.started = step, time.monotonic()
        self.sums: dict[str, Tensor] = {}
        self.count, self.window_started = 0, time.monotonic()

    def __enter__(self) -> _Log:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.plan.total_steps,
            initial=self.start_step,
            desc=self.task.name,
            unit="step",
            disable=not self.run.writes,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.run.close()

    def elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02d} min"

    def add(self, step: int, lr: float, metrics: dict[str, Tensor], batch: Batch) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.bar.update()
        if step % self.config.log_every == 0 or step == self.plan.total_steps:
            self._flush(step, lr)
        epoch, rest = divmod(step, self.plan.steps_per_epoch)
        if self.run.writes and rest == 0 and (epoch & (epoch - 1) == 0 or step == self.plan.total_steps):
            for name, picture in self.task.pictures(batch).items():
                self.run.image(name, picture, step)

    def _flush(self, step: int, lr: float) -> None:
        names = list(self.sums)
        values = torch.stack([self.sums[n].to(self.world.device, torch.float64) for n in names]) / self.count
        means = dict(zip(names, (self.world.sum(values) / self.world.size).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss became {means['loss']} in the {self.count} steps before step {step}. Nothing was saved "
                "since the last checkpoint. Lower --lr, lengthen --warmup-epochs, or use --precision fp32."
            )
        seconds = max(time.monotonic() - self.window_started, 1e-9)
        speed = self.count * self.config.batch_size * self.world.size / seconds
        means.update(self.task.report(), epoch=step / self.plan.steps_per_epoch, lr=lr, images_per_second=speed)
        self.run.metrics(step, means)
        left = (self.plan.total_steps - step) * seconds / self.count
        self.run.print(
            f"{self.task.name}  step {step}/{self.plan.total_steps}  epoch {means['epoch']:.1f}  "
            f"loss {means['loss']:.3f}  {self.task.line(means)}  lr {lr:.1e}  {speed:.0f} img/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        self.sums, self.count, self.window_started = {}, 0, time.monotonic()
