"""What accompanies a training: the log, the steps that do not count, signals that stop it, and a watchdog."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..config.training import TrainConfig
from ..distributed import World
from ..errors import UserError
from ..models.attention import choose_attention
from ..runs.checkpoints import save_weights
from ..runs.folder import RunFolder
from .optim import Schedule
from .task import Batch, Task


class TrainingLog:
    """Means over the steps since the last line, the progress bar, pictures now and then, all by the monotonic clock."""

    def __init__(self, task: Task, run: RunFolder, world: World, schedule: Schedule, config: TrainConfig, step: int):
        self.task, self.run, self.world, self.schedule, self.config = task, run, world, schedule, config
        self.start_step, self.started = step, time.monotonic()
        self._clear(step)

    def opening(self, images: int, parameters: int, precision: str, backend: str) -> None:
        """What is trained on what and how, and from where it goes on."""
        name, schedule, device = self.task.name, self.schedule, self.world.device.type
        epochs = f"{schedule.epochs} epoch{'s' * (schedule.epochs > 1)}"
        size = f"{parameters / 1e6:.1f} M" if parameters > 1e6 else f"{parameters:,}"
        self.run.print(
            f"{name}: {images:,} images, {epochs}, {schedule.total_steps:,} steps of "
            f"{schedule.images_per_step} images; {size} parameters; {self.world.size} x {device}, "
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
            disable=None if self.run.writes else True,  # None: shown on terminals only
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

    def ask(self, step: int) -> None:
        """After a step: what its line needs from the task sets out for the host."""
        if self._line_due(step):
            report = self.task.report()
            self.report_names = list(report)
            self.report: HostCopy | None = HostCopy(torch.stack(list(report.values()))) if report else None

    def add(self, step: int, lr: float, metrics: dict[str, float], batch: Batch) -> None:
        """A step that the host knows of; ``metrics`` is empty if it was skipped, on every rank."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += bool(metrics)
        self.steps += 1
        self.bar.update()
        if self._line_due(step):
            self._line(step, lr)
        if self.pictures_due(step):
            # On every rank, though only one writes: under ZeRO 3 they have the weights only together.
            first = {name: values[:1].to(self.world.device) for name, values in batch.items()}
            for name, picture in self.task.pictures(first).items():
                self.run.image(name, picture, step)

    def pictures_due(self, step: int) -> bool:
        """At the end of epochs 1, 2, 4, 8, ... and of the training."""
        epoch = self.schedule.ended_epoch(step)
        return bool(epoch and epoch & (epoch - 1) == 0) or step == self.schedule.total_steps

    def _line_due(self, step: int) -> bool:
        """A window shorter than half of --log-every, after a resume or before the end, becomes part of the one beside
        it: the codes used in a single step would look like a collapse."""
        every, total = self.config.log_every, self.schedule.total_steps
        whole = 2 * min(step - self.window_step, total - step) >= every
        return (step % every == 0 and whole) or step == total

    def _line(self, step: int, lr: float) -> None:
        if not self.count:
            return  # every step was skipped, and said so
        names = list(self.sums)
        values = torch.tensor([self.sums[n] for n in names], dtype=torch.float64) / self.count
        if self.world.size > 1:
            values = values.to(self.world.device)
        means = dict(zip(names, (self.world.sum(values) / self.world.size).tolist(), strict=True))
        seconds = max(time.monotonic() - self.window_started, 1e-9)
        speed = self.steps * self.schedule.images_per_step / seconds
        if self.report is not None:
            means.update(zip(self.report_names, self.report.read(), strict=True))
        means.update(epoch=self.schedule.epoch(step), lr=lr, images_per_second=speed)
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
        self._clear(step)

    def _clear(self, step: int) -> None:
        self.window_step = step
        self.sums: dict[str, float] = {}
        self.report = None
        self.count = self.steps = 0
        self.window_started = time.monotonic()


def poisoned(loss: Tensor) -> Tensor:
    """The loss; if it is NaN or Inf, its gradient is NaN everywhere, which the sum over ranks tells all of them.

    So every rank skips the same steps, with no message beside the gradient.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def learns_late(device: torch.device) -> bool:
    """Whether the host learns one step later what a step came to: now it would have to wait for the device."""
    return device.type != "cpu"


class HostCopy:
    """Numbers that set out for the host, which need not wait for what its device was given to do after them."""

    def __init__(self, values: Tensor):
        self.values = values.detach().to("cpu", non_blocking=True)  # from a GPU to pinned memory
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class OnAnyRank:
    """Which flags are set on any rank, in every step; of several GPUs one step later, and none waits for it."""

    def __init__(self, world: World):
        self.world = world
        self.sent: HostCopy | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        if self.world.size == 1:
            return list(flags)
        base = self.world.size + 1  # a digit of one number counts the ranks that set a flag
        number = float(sum(flag * base**i for i, flag in enumerate(flags)))
        sent = HostCopy(self.world.sum(torch.full((1,), number, device=self.world.device)))
        known, self.sent = (self.sent, sent) if learns_late(self.world.device) else (sent, None)
        total = 0 if known is None else int(known.read()[0])
        return [total // base**i % base > 0 for i in range(len(flags))]


class Undo:
    """The buffers that a forward changes (codebook, statistics), put back by the device if a step did not count."""

    def __init__(self, model: nn.Module):
        stored = model.state_dict().keys()
        self.model = model
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_buffers()}
        self.places = {n: (owner, n.rpartition(".")[2]) for n, owner in owners.items() if n in stored}
        self.kept = [b.clone() for b in self._buffers()]

    def keep(self) -> None:
        """Before a step."""
        if self.kept:
            torch._foreach_copy_(self.kept, self._buffers())

    def back(self, norm: Tensor) -> None:
        """After a step: what was kept, if the norm of its gradient is not finite."""
        if not self.kept:
            return
        good = norm.isfinite()
        for kept, buffer in zip(self.kept, self._buffers(), strict=True):
            torch.where(good.to(buffer.device), buffer, kept, out=buffer)

    def tell(self) -> None:
        """Once the host knows that buffers were put back: through load_state_dict, which tells modules that keep a copy
        of a buffer's value elsewhere. What the log counts, in buffers that are not stored, stays.
        """
        counts = [(b, b.clone()) for name, b in self.model.named_buffers() if name not in self.places]
        self.model.load_state_dict(dict(zip(self.places, self._buffers(), strict=True)), strict=False)
        for buffer, count in counts:
            buffer.copy_(count)

    def _buffers(self) -> list[Tensor]:
        return [owner.get_buffer(name) for owner, name in self.places.values()]


class BadSteps:
    """Counts bad steps. All ranks see the same ones (see ``poisoned``).

    Args:
        limit: so many in a row end the training. skipped: how many there were before this process started.
        paths: the images' names, by index.
    """

    def __init__(self, run: RunFolder, world: World, limit: int, skipped: int, paths: list[str]):
        self.run, self.world, self.limit, self.paths = run, world, limit, paths
        self.skipped, self.in_a_row = skipped, 0
        self._first: tuple[int, float, Batch] | None = None

    def good(self) -> None:
        self.in_a_row, self._first = 0, None

    def bad(self, step: int, loss: float, norm: float, batch: Batch, scale: float = 1.0) -> None:
        """Count and report one; UserError if it was one too many. ``loss`` is this rank's.

        With a loss ``scale`` above 1, finite losses and an infinite gradient only say that the scale is too large.
        """
        if scale > 1 and not self.world.any(not math.isfinite(loss)):
            self.run.print(
                f"step {step} skipped: the gradient is beyond fp16 at a loss scale of {scale:,.0f}, which is halved; "
                "weights and codebook stay as they were"
            )
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self._first is None or (math.isfinite(self._first[1]) and not math.isfinite(loss)):
            self._first = step, loss, batch
        self.run.print(
            f"step {step} skipped: the loss is {loss} on rank {self.world.rank}, the gradient's norm {norm}; weights "
            f"and codebook stay as they were ({self.in_a_row} in a row, {self.skipped} in all)"
        )
        if self.in_a_row >= self.limit:
            self.stop(step)

    def stop(self, step: int) -> None:
        """Write the first bad batch of the row, on the ranks where it was, and raise UserError. Every rank calls it."""
        assert self._first is not None
        mine = not math.isfinite(self._first[1])
        write = not self.world.any(mine) or mine  # the collective first: every rank has to take part
        said = f"The first batch that did it, with its images' names, is in {self.write()}. " if write else ""
        raise UserError(
            f"the loss or its gradient was NaN or Inf in {self.in_a_row} steps in a row, the last being {step}. "
            "Nothing was saved since they began: the last checkpoint is good, and the same command resumes from it. "
            f"{said}Otherwise lower --lr, lengthen --warmup-epochs, or use --precision fp32."
        )

    def write(self) -> Path:
        """That batch as safetensors, its images' names in the file's metadata."""
        assert self._first is not None
        step, loss, batch = self._first
        file = self.run.path / f"bad_batch_step_{step:08d}_rank_{self.world.rank}.safetensors"
        names = [self.paths[i] for i in batch["index"].tolist()] if "index" in batch else []
        save_weights(batch, file, {"step": str(step), "loss": str(loss), "images": json.dumps(names)})
        return file


def stopping_signals() -> list[signal.Signals]:
    """What asks this process to stop: a hangup too, unless it was told to outlive that."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP ask for a stop after the current step; a second Ctrl-C is obeyed at once.

    A second SIGTERM is not: launchers pass on what their process group has already got, and would end the save. SIGHUP
    comes from a terminal that is closed; under ``nohup`` it stays without effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in stopping_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


EXIT_HUNG = 75  # of sysexits.h: a temporary failure, worth another try
GRACE = 10.0  # seconds that the other ranks have to write their traces before this one's end lets a launcher kill them


class Watchdog:
    """Inside, ``progress`` has to be called every so many seconds.

    If it is not, every thread's stack goes to stderr and to hang_rank_R.txt in the folder, and the process ends with
    code 75. A process whose interpreter is blocked too (native code that holds its lock) is ended by faulthandler's own
    timer, a little later and with a trace only on stderr. Time is that of the monotonic clock.
    """

    def __init__(self, folder: Path, rank: int, seconds: float):
        self.file, self.rank, self.seconds = folder / f"hang_rank_{rank}.txt", rank, seconds
        self.grace = min(GRACE, seconds)
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.progress()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """The training lives."""
        if not self.seconds:
            return
        self.last = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + 2 * self.grace, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._closed.wait(max(self.last + self.seconds - time.monotonic(), 0.01)):
            if time.monotonic() >= self.last + self.seconds:
                self._end()

    def _end(self) -> None:
        said = (
            f"rank {self.rank}: no step in {self.seconds:g} seconds, so this process ends with code {EXIT_HUNG}. The "
            "stacks below, and those of the other ranks, show what it waits for. The same command resumes from the "
            "last checkpoint; --hang-after changes the time.\n"
        )
        try:
            with self.file.open("w") as file:
                file.write(said)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            said += f"({self.file} could not be written: {error})\n"
        with contextlib.suppress(OSError):  # a console that is gone
            print(said, file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        time.sleep(self.grace)
        os._exit(EXIT_HUNG)
