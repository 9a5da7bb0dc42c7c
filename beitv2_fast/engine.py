"""The one training loop: every stage of BEiT v2 is a Task that it drives.

All randomness is a function of (seed, step) or (seed, epoch, sample), so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention import choose_attention
from .backend import DeepSpeedBackend, TorchBackend, check_optimizer_state, deepspeed_settings
from .bad_steps import BadSteps, Undo, poisoned
from .checkpoint import Checkpoints, load_model, read_weights, save_weights
from .config import RunConfig, TrainConfig
from .data import ImageFolder, ImageList, check_images, choose_loader, find_images, train_loader
from .distributed import World, autocast_dtype
from .ema import ModelEMA
from .errors import UserError, require
from .optim import no_weight_decay, parameter_groups
from .plan import Plan
from .run import RunFolder
from .stop_signal import StopSignal
from .torch_loader import deaths_explained
from .training_log import TrainingLog
from .transforms import View
from .watchdog import Watchdog

Batch = dict[str, Tensor]
NAMES = ("index", "view")  # say which images a batch holds: the host reads them, and need not wait for them
# After an epoch, on every rank: the step, the models to look at by name, and what tells that it goes on.
AfterEpoch = Callable[[int, dict[str, nn.Module], Callable[[], None]], None]


class Task(Protocol):
    """What a stage brings: its model, what a step does with a batch, what it tells the log.

    Stages are subclasses; what has a body here may stay as it is.
    """

    name: str
    model: nn.Module

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and scalars for the log. ``model`` is the wrapped model: call it, not ``self.model``."""

    def prepare(self, micro_batches: list[Batch]) -> None:
        """Before a first step of several micro-batches: what must see them all at once."""
        return

    def report(self) -> dict[str, float]:
        """Further numbers over the window since the last line of the log."""
        return {}

    def line(self, metrics: dict[str, float]) -> str:
        """The stage's part of a console line."""

    def warning(self, metrics: dict[str, float], steps: int) -> str | None:
        """What is wrong with the numbers of a line, which cover so many steps, and what to try."""
        return None

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures [3, H, W] in [0, 1] for TensorBoard, of a batch of one image."""


def checked_images(
    data: Path,
    split: str | None,
    config: RunConfig,
    run: RunFolder,
    world: World,
    *,
    min_size: int,
    name: str = "",
    labelled: bool = False,
) -> ImageList:
    """The images of a folder, checked once: rank 0 decodes them all, the others read what it wrote beside the run.

    The log says what was found. ``split``, ``labelled``: see ``find_images``. ``name``: of what is written, where a run
    has several lists.
    """

    def checked() -> ImageList:
        found = find_images(data, split, labelled=labelled, index=run.path / f"shards{name}.json")
        run.print(found.summary)
        return check_images(found, cache=run.path / f"images{name}.json", min_size=min_size, workers=config.workers)

    if world.rank == 0:
        images = checked()
    world.barrier()
    return images if world.rank == 0 else checked()


def training_images(
    config: TrainConfig, view: View, run: RunFolder, world: World, *, labelled: bool = False
) -> ImageFolder:
    """The images of --data and how they are loaded, which the log says. ``labelled``: see ``find_images``."""
    loader, why = choose_loader(config.loader, in_memory=config.in_memory)
    images = checked_images(config.data, "train", config, run, world, min_size=config.patch_size, labelled=labelled)
    dataset = ImageFolder(images, view, config.seed, in_memory=config.in_memory, loader=loader, device=world.device)
    run.print(f"images: {len(images):,} from {images.root}, loaded by {loader} on the {dataset.device.type} ({why})")
    return dataset


def open_run(config: TrainConfig, world: World, *, deepspeed: bool) -> RunFolder:
    """The run folder of a training, once the options that need no images are seen to work here."""
    choose_attention(config.attention, world.device.type)
    if deepspeed:
        require("deepspeed", "deepspeed", "Training with DeepSpeed")
        deepspeed_settings(config, world.device)
    return RunFolder(config, world.rank)


def train(
    task: Task,
    config: TrainConfig,
    dataset: ImageFolder,
    run: RunFolder,
    world: World,
    *,
    deepspeed: bool = False,
    layer_decay: float = 1.0,
    ema_decay: float = 0.0,
    after_epoch: AfterEpoch | None = None,
    every_epochs: int = 1,
    plan: Plan | None = None,
) -> int:
    """Train to the end, or until a signal. Returns the exit code: 0, or 128 + the signal's number after saving.

    Args:
        layer_decay: see ``parameter_groups``.
        ema_decay: above 0: a ``ModelEMA`` follows the weights, and lies in the checkpoints as ema.safetensors.
        after_epoch: called with the models "weights" and, if there is one, "average", before the epoch is saved: after
            every ``every_epochs``-th and the last.
        plan: of steps and learning rates; None: what the config says.
    """
    plan = plan or Plan.of(config, len(dataset), world.size)
    task.model.to(world.device).train()
    checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints)
    ema = ModelEMA(task.model, ema_decay) if ema_decay else None
    about, optimizer_state = _resume(checkpoints, task.model, ema, plan, dataset, run, world)
    step = about["step"]
    spared = no_weight_decay(task.model)
    groups = parameter_groups(task.model, config.weight_decay, layer_decay=layer_decay, skip=spared)
    backend = (DeepSpeedBackend if deepspeed else TorchBackend)(task.model, groups, config, world)
    if step:
        backend.restore(optimizer_state)
    del optimizer_state
    amp = autocast_dtype(config.precision, world.device)
    parameters = sum(p.numel() for group in groups for p in group["params"])
    run.print(
        f"{task.name}: {len(dataset):,} images, {plan.epochs} epochs, {plan.total_steps:,} steps of "
        f"{plan.images_per_step} images; {parameters / 1e6:.1f} M parameters; {world.size} x {world.device.type}, "
        f"{'bf16 autocast' if amp else 'fp32'}, {backend.name}, "
        f"attention {choose_attention(config.attention, world.device.type)}, lr {plan.peak_lr:.2e}"
    )
    if step:
        run.print(f"{task.name}: resumed at step {step} of {plan.total_steps}")
    if step >= plan.total_steps:
        run.print(f"{task.name}: already complete")
        return 0

    loader = train_loader(
        dataset,
        batch_size=config.batch_size * config.accumulate,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        start_step=step,
        total_steps=plan.total_steps,
        workers=config.workers,
    )
    bad = BadSteps(run, world, config.stop_after_bad, about["skipped_steps"], dataset.images.paths)
    log = TrainingLog(task, run, world, plan, config, step)
    saved = step
    watchdog = Watchdog(run.path, world.rank, config.hang_after)
    with StopSignal() as stop, log, watchdog, deaths_explained():
        for batch in loader:
            undo = Undo(task.model)
            metrics = _gradient(task, backend, batch, config, step, world, amp)
            lr = plan.lr(step)
            norm = backend.step(lr)
            step += 1
            if norm.isfinite():
                bad.good()
                if ema is not None:
                    ema.update(task.model, step, backend.whole)
                log.add(step, lr, {**metrics, "grad_norm": norm}, batch)
            else:
                undo()
                log.add(step, lr, {}, batch)
                bad.bad(step, metrics["loss"].item(), norm.item(), batch)
            stopping = world.any(stop.received is not None)
            ends = step == plan.total_steps
            epoch = plan.ended_epoch(step)
            if after_epoch is not None and (ends or (epoch and epoch % every_epochs == 0 and not stopping)):
                models = {"weights": backend.wrapped, **({"average": ema.model} if ema else {})}
                after_epoch(step, models, watchdog.progress)
            due = stopping or step - saved >= config.save_every - saved % config.save_every or ends
            if due and not bad.in_a_row:  # among bad steps the weights are suspect
                about = {"images_per_step": plan.images_per_step, "skipped_steps": bad.skipped}
                of_images = {"images": dataset.images.fingerprint, "image_count": len(dataset)}
                _save(checkpoints, backend, ema, step, world, **of_images, **about)
                saved = step
            watchdog.progress()
            if stopping and step < plan.total_steps:
                said = "saved" if saved == step else f"after bad steps, so the checkpoint of step {saved} remains"
                run.print(f"{task.name}: stopped at step {step}, {said}; the same command resumes")
                return 128 + (stop.received or signal.SIGTERM)
        if bad.in_a_row:
            bad.stop(step)
    run.print(f"{task.name}: done, {log.elapsed()}; checkpoint {checkpoints.finished(step)}")
    return 0


def _gradient(
    task: Task,
    backend: TorchBackend | DeepSpeedBackend,
    batch: Batch,
    config: TrainConfig,
    step: int,
    world: World,
    amp: torch.dtype | None,
) -> dict[str, Tensor]:
    """Forward and backward of the step's micro-batches; the mean of the loss and of the metrics over them."""
    slices = [slice(i * config.batch_size, (i + 1) * config.batch_size) for i in range(config.accumulate)]
    batch = {name: v if name in NAMES else v.to(world.device, non_blocking=True) for name, v in batch.items()}
    parts = [{name: v[s] for name, v in batch.items()} for s in slices]
    sums: dict[str, Tensor] = {}
    with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
        if step == 0 and len(parts) > 1:
            task.prepare(parts)
    for i, part in enumerate(parts):
        # As many micro-batches as there are ranks draw the same numbers as the ranks would.
        torch.manual_seed(_mix(config.seed, step, world.rank * len(parts) + i))
        last = i + 1 == len(parts)
        with backend.micro_batch(last):
            with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
                loss, metrics = task.loss(backend.wrapped, part)
            backend.backward(poisoned(loss), last)
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() / len(parts)
    return sums


def _mix(seed: int, step: int, lane: int) -> int:
    """A seed for torch's generators in one micro-batch of a step."""
    return (seed * 1_000_003 + step) * 4_099 + lane


def _resume(
    checkpoints: Checkpoints,
    model: nn.Module,
    ema: ModelEMA | None,
    plan: Plan,
    dataset: ImageFolder,
    run: RunFolder,
    world: World,
) -> tuple[dict, dict[str, Tensor]]:
    """Weights and codebook of the newest good checkpoint into the model.

    Returns:
        (what training.json says, the optimiser's state); (step 0, {}) if there is no checkpoint.
    """
    found: dict[str, dict] = {"about": {"step": 0, "skipped_steps": 0}, "optimizer": {}}

    def load(folder: Path) -> None:
        found["about"], found["optimizer"] = _read_checkpoint(folder, model, ema)

    step = checkpoints.latest(load, run.print)
    if world.any(step != world.first(step)):
        raise UserError(f"the ranks found different checkpoints in {run.checkpoints}: all need the same --out folder")
    if step and found["about"]["images_per_step"] != plan.images_per_step:
        raise UserError(
            f"{run.path} was trained with {found['about']['images_per_step']} images a step, these options give "
            f"{plan.images_per_step}. Choose --batch-size and --accumulate so that their product with the number of "
            "ranks stays, or choose another --out."
        )
    _accept_images(found["about"], dataset, run)
    return found["about"], found["optimizer"]


def _accept_images(about: dict, dataset: ImageFolder, run: RunFolder) -> None:
    """Images that changed where they were are the user's own doing, and worth a warning; at another place they are a
    mistake, unless they are the same ones.
    """
    step, known, images = about["step"], run.inputs.get("data"), dataset.images
    moved = bool(step) and "data" in run.moved
    found = _content(dataset) if moved or run.writes else known
    changed = bool(step) and (about["images"] != images.fingerprint or known not in (None, found))
    if moved and changed:
        raise UserError(
            f"{run.path} was trained on other images than the {len(images):,} in {images.root}: names, classes or "
            "bytes differ. Nothing was changed. Name the folder with the same ones, or choose another --out."
        )
    if changed:
        before = f", {about['image_count']:,} then" if "image_count" in about else ""
        run.print(
            f"warning: the images are others than at step {step} (files came, went, were renamed or replaced; "
            f"{len(images):,} now{before}): the run goes on, but not as it would have with the old ones"
        )
    run.accept(data=found)


def _content(dataset: ImageFolder) -> str:
    """A hash of names, labels and sizes in bytes, and of the names and sizes of masks, if there are any."""
    images, masks = dataset.images, getattr(dataset, "masks", None)
    files = [] if images.spans else [images.file(i) for i in range(len(images))]
    files += [] if masks is None else [masks.root / path for path in masks.paths]
    names = [images.paths, images.labels, images.spans, None if masks is None else masks.paths]
    return hashlib.sha256(json.dumps([names, [file.stat().st_size for file in files]]).encode()).hexdigest()


def _read_checkpoint(folder: Path, model: nn.Module, ema: ModelEMA | None) -> tuple[dict, dict[str, Tensor]]:
    """Load the weights, once all of the checkpoint has been read; returns training.json and the optimiser's state."""
    weights, optimizer = (read_weights(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    about = json.loads((folder / "training.json").read_text())
    check_optimizer_state(optimizer, model, str(folder / "optimizer.safetensors"))
    average = read_weights(folder / "ema.safetensors") if ema is not None else None
    load_model(model, weights, str(folder))
    if ema is not None:
        load_model(ema.model, average, str(folder / "ema.safetensors"))
    return about, optimizer


def _save(
    checkpoints: Checkpoints,
    backend: TorchBackend | DeepSpeedBackend,
    ema: ModelEMA | None,
    step: int,
    world: World,
    **about: object,
) -> None:
    """Write a checkpoint on rank 0; if that fails, every rank raises."""
    weights, optimizer = backend.weights(), backend.optimizer_state()
    problem: OSError | None = None
    try:
        if world.rank == 0:
            checkpoints.begin(step)
            save_weights(weights, checkpoints.unfinished(step) / "model.safetensors")
            save_weights(optimizer, checkpoints.unfinished(step) / "optimizer.safetensors")
            if ema is not None:
                save_weights(ema.model.state_dict(), checkpoints.unfinished(step) / "ema.safetensors")
            checkpoints.commit(step, **about)
    except OSError as error:
        problem = error
    if world.any(problem is not None):
        raise UserError(
            f"the checkpoint of step {step} could not be written: {problem or 'see rank 0'}. The one before it is "
            "intact; make room and start the same command again."
        ) from problem
