"""What a training tells while it runs: console lines, metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..config.training import TrainConfig
from ..distributed import World
from ..models.attention import choose_attention
from ..runs.folder import RunFolder
from .optim import Schedule
from .task import Batch, Task


class TrainingLog:
    """Means over the steps since the last line, the progress bar, pictures now and then, all by the monotonic clock."""

    def __init__(self, task: Task, run: RunFolder, world: World, schedule: Schedule, config: TrainConfig, step: int):
        self.task, self.run, self.world, self.schedule, self.config = task, run, world, schedule, config
        self.start_step, self.started = step, time.monotonic()
        self._clear()

    def opening(self, images: int, parameters: int, precision: str, backend: str) -> None:
        """What is trained on what and how, and from where it goes on."""
        name, schedule, device = self.task.name, self.schedule, self.world.device.type
        self.run.print(
            f"{name}: {images:,} images, {schedule.epochs} epochs, {schedule.total_steps:,} steps of "
            f"{schedule.images_per_step} images; {parameters / 1e6:.1f} M parameters; {self.world.size} x {device}, "
            f"{precision}, {backend}, attention {choose_attention(self.config.attention, device)}, "
            f"lr {schedule.peak_lr:.2e}"
        )
        if self.start_step:
            self.run.print(f"{name}: resumed at step {self.start_step} of {schedule.total_steps}")

    def __enter__(self) -> TrainingLog:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.schedule.total_steps,
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
        """A step; ``metrics`` is empty if it was skipped, on every rank."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += bool(metrics)
        self.steps += 1
        self.bar.update()
        if step % self.config.log_every == 0 or step == self.schedule.total_steps:
            self._line(step, lr)
        epoch = self.schedule.ended_epoch(step)
        if (epoch and epoch & (epoch - 1) == 0) or step == self.schedule.total_steps:
            # On every rank, though only one writes: under ZeRO 3 they have the weights only together.
            first = {name: values[:1].to(self.world.device) for name, values in batch.items()}
            for name, picture in self.task.pictures(first).items():
                self.run.image(name, picture, step)

    def _line(self, step: int, lr: float) -> None:
        if not self.count:
            return  # every step was skipped, and said so
        names = list(self.sums)
        values = torch.stack([self.sums[n].to(self.world.device, torch.float64) for n in names]) / self.count
        means = dict(zip(names, (self.world.sum(values) / self.world.size).tolist(), strict=True))
        seconds = max(time.monotonic() - self.window_started, 1e-9)
        speed = self.steps * self.schedule.images_per_step / seconds
        means.update(self.task.report(), epoch=self.schedule.epoch(step), lr=lr, images_per_second=speed)
        if self.steps > self.count:
            means["skipped_steps"] = self.steps - self.count
        self.run.metrics(step, means)
        left = (self.schedule.total_steps - step) * seconds / self.steps
        self.run.print(
            f"{self.task.name}  step {step}/{self.schedule.total_steps}  epoch {means['epoch']:.1f}  "
            f"loss {means['loss']:.3f}  {self.task.line(means)}  lr {lr:.1e}  {speed:.0f} img/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        warning = self.task.warning(means, self.steps)
        if warning:
            self.run.print(f"warning: {warning}")
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = self.steps = 0
        self.window_started = time.monotonic()
