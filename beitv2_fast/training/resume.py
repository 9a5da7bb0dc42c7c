"""Checkpoints of the loop: the newest good one is read, and every rank knows if one could not be written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..data.images import ImageFolder
from ..distributed import World
from ..errors import UserError
from ..runs.checkpoints import Checkpoints, load_model, read_weights, save_weights
from ..runs.files import atomically
from ..runs.folder import RunFolder
from .deepspeed import DeepSpeedBackend
from .ema import ModelEMA
from .optim import Schedule, TorchBackend, check_optimizer_state


def resume(
    checkpoints: Checkpoints,
    model: nn.Module,
    ema: ModelEMA | None,
    schedule: Schedule,
    dataset: ImageFolder,
    run: RunFolder,
    world: World,
) -> tuple[dict, dict[str, Tensor]]:
    """Weights and codebook of the newest good checkpoint into the model.

    Returns:
        (what training.json says, the optimizer's state); (step 0, {}) if there is no checkpoint.
    """
    found: dict[str, dict] = {"about": {"step": 0, "skipped_steps": 0}, "optimizer": {}}

    def load(folder: Path) -> None:
        found["about"], found["optimizer"] = read_checkpoint(folder, model, ema)

    step = checkpoints.latest(load, run.print)
    if world.any(step != world.first(step)):
        raise UserError(f"the ranks found different checkpoints in {run.checkpoints}: all need the same --out folder")
    if step and found["about"]["images_per_step"] != schedule.images_per_step:
        raise UserError(
            f"{run.path} was trained with {found['about']['images_per_step']} images per step, these options give "
            f"{schedule.images_per_step}. Choose --batch-size and --accumulate so that their product with the number "
            "of ranks stays, or choose another --out."
        )
    _accept_images(found["about"], dataset, run)
    return found["about"], found["optimizer"]


def _accept_images(about: dict, dataset: ImageFolder, run: RunFolder) -> None:
    """Images that changed where they were are the user's own doing, and worth a warning; at another place they are a
    mistake, unless they are the same ones.
    """
    step, known, images = about["step"], run.inputs.get("data"), dataset.images
    moved = bool(step) and "data" in run.moved
    found = images_hash(dataset) if moved or run.writes else known
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
    if found is not None:
        run.accept(data=found)


def images_hash(dataset: ImageFolder) -> str:
    """A hash of names, labels and sizes in bytes, and of the names and sizes of masks, if there are any."""
    images, masks = dataset.images, getattr(dataset, "masks", None)
    files = [] if images.spans else [images.file(i) for i in range(len(images))]
    files += [] if masks is None else [masks.root / path for path in masks.paths]
    names = [images.paths, images.labels, images.spans, None if masks is None else masks.paths]
    return hashlib.sha256(json.dumps([names, [file.stat().st_size for file in files]]).encode()).hexdigest()


def read_checkpoint(folder: Path, model: nn.Module, ema: ModelEMA | None) -> tuple[dict, dict[str, Tensor]]:
    """Load the weights, once all of the checkpoint has been read; returns training.json and the optimizer's state."""
    weights, optimizer = (read_weights(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    about = json.loads((folder / "training.json").read_text())
    check_optimizer_state(optimizer, model, str(folder / "optimizer.safetensors"))
    average = read_weights(folder / "ema.safetensors") if ema is not None else {}
    load_model(model, weights, str(folder))
    if ema is not None:
        load_model(ema.model, average, str(folder / "ema.safetensors"))
    return about, optimizer


def save(
    checkpoints: Checkpoints,
    backend: TorchBackend | DeepSpeedBackend,
    ema: ModelEMA | None,
    step: int,
    world: World,
    **about: object,
) -> None:
    """Write a checkpoint on rank 0; if that fails, every rank raises."""
    weights, optimizer = backend.weights(), backend.optimizer_state()

    def write() -> None:
        checkpoints.begin(step)
        save_weights(weights, checkpoints.unfinished(step) / "model.safetensors")
        save_weights(optimizer, checkpoints.unfinished(step) / "optimizer.safetensors")
        if ema is not None:
            save_weights(ema.model.state_dict(), checkpoints.unfinished(step) / "ema.safetensors")
        checkpoints.commit(step, **about)

    advice = "The one before it is intact; make room and start the same command again."
    _write_on_rank_0(write, world, f"the checkpoint of step {step}", advice)


def save_best(
    folder: Path, name: str, backend: TorchBackend | DeepSpeedBackend, ema: ModelEMA | None, step: int, world: World
) -> None:
    """The best weights so far, or their average, as folder/model.safetensors; if that fails, every rank raises."""
    weights = backend.weights() if ema is None or name == "weights" else ema.model.state_dict()

    def write() -> None:
        folder.mkdir(exist_ok=True)
        atomically(folder / "model.safetensors", lambda temporary: save_weights(weights, temporary))

    advice = "Make room and start the same command again."
    _write_on_rank_0(write, world, f"the best weights, of step {step},", advice)


def _write_on_rank_0(write: Callable[[], None], world: World, what: str, advice: str) -> None:
    problem: OSError | None = None
    try:
        if world.rank == 0:
            write()
    except OSError as error:
        problem = error
    if world.any(problem is not None):
        raise UserError(f"{what} could not be written: {problem or 'see rank 0'}. {advice}") from problem
