"""Where a fine-tuning starts, what a step of it does, and what it is measured by (arXiv 2208.06366 section 3.2)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.downstream import EvaluateConfig, FinetuneConfig
from ..config.training import TrainConfig
from ..data.find import find_split
from ..data.images import ImageFolder
from ..data.loaders import choose_loader
from ..data.views import EvalView
from ..distributed import World, autocast_dtype
from ..errors import UserError
from ..models.classifier import Classifier, ClassifierConfig
from ..runs.checkpoints import latest_weights, load_model, read_weights
from ..runs.files import write_atomically
from ..runs.folder import RunFolder, is_run_folder
from ..runs.logs import is_best
from ..runs.sources import locate
from ..teachers import create_teacher
from ..teachers.classifier import TeacherClassifier, teacher_name
from ..training.images import checked_images
from ..weights.build import run_config, vit_config
from ..weights.create import open_model
from ..weights.files import read
from ..weights.start import check_shape, describe_new, start_config, start_from
from .evaluation import columns_of, evaluate_classifier

CLASSES_FILE = "classes.json"  # in the run folder: the names of the classes, in the order of the logits
# a new head starts so small that the first gradients do not disturb the backbone (--init_scale of the reference's
# run_class_finetuning.py)
HEAD_SCALE = 1e-3


def start_model(
    config: FinetuneConfig, classes: list[str], say: Callable[[str], None]
) -> Classifier | TeacherClassifier:
    """A classifier with the weights that the config names, at its image size and drop path, and a head for the classes.

    The head is kept where the weights are a classifier's with these very classes (a run folder tells; of a file's as
    many are taken for the same).

    Raises:
        UserError: the weights are of another shape than the options say; CheckpointError: they cannot be read.
    """
    if config.from_scratch:
        model = Classifier(ClassifierConfig(vit_config(config, position="relative"), len(classes)))
        return _small_head(model)
    if (name := teacher_name(config.weights)) is not None:
        say(f"weights of the teacher {name}, without drop path; fc_norm and head are new")
        return _small_head(teacher_classifier(config, name, len(classes)))
    assert config.weights is not None
    loaded = read(config.weights)
    vit = start_config(config, loaded.backbone(heads=config.heads))
    model = Classifier(ClassifierConfig(vit, len(classes)))
    state: Mapping[str, Tensor] = loaded.ours
    if (known := stored_classes(locate(config.weights))) is not None and known != classes:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    new = start_from(model, state, str(config.weights))
    say(f"weights from {config.weights}; {describe_new(new)}")
    return _small_head(model) if "head.weight" in new else model


def teacher_classifier(config: FinetuneConfig, name: str, num_classes: int) -> TeacherClassifier:
    """A teacher that reads images of the config's size, with a new head."""
    teacher = create_teacher(name, (config.image_size // config.patch_size,) * 2, config.teacher_weights)
    check_shape(config, teacher, ("patch_size",))
    if config.image_size % config.patch_size:
        raise UserError(f"--image-size {config.image_size} is not a multiple of --patch-size {config.patch_size}.")
    return TeacherClassifier(teacher, config.image_size, num_classes)


def load_classifier(
    source: Path, image_size: int | None = None, *, average: bool = False
) -> tuple[nn.Module, TrainConfig | None]:
    """``open_model``, that reads the fine-tuning of a teacher, too."""
    config = run_config(source) if is_run_folder(source) else None
    name = teacher_name(config.weights) if isinstance(config, FinetuneConfig) else None
    if not isinstance(config, FinetuneConfig) or name is None:
        return open_model(source, image_size, average=average)
    config = dataclasses.replace(config, image_size=image_size or config.image_size)
    file = latest_weights(source).with_name("ema.safetensors" if average else "model.safetensors")
    state = read_weights(file)
    model = teacher_classifier(config, name, len(state["head.weight"]))
    load_model(model, state, str(file))
    return model.eval(), config


def _small_head(model: Classifier | TeacherClassifier) -> Classifier | TeacherClassifier:
    with torch.no_grad():
        model.head.weight.mul_(HEAD_SCALE)
        model.head.bias.mul_(HEAD_SCALE)
    return model


def stored_classes(run: Path) -> list[str] | None:
    """The classes that a fine-tuning wrote into its run folder; None if this is none."""
    file = run / CLASSES_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def store_classes(run: RunFolder, classes: list[str]) -> None:
    """Write them, or refuse if the run was trained for others."""
    known = stored_classes(run.path)
    if known is not None and known != classes and any(run.checkpoints.glob("step_*")):
        raise UserError(
            f"{run.path} was trained for {len(known)} classes ({', '.join(known[:5])}, ...), --data has {len(classes)} "
            f"({', '.join(classes[:5])}, ...). Restore the class folders, or choose another --out."
        )
    if run.writes:
        write_atomically(run.path / CLASSES_FILE, json.dumps(classes) + "\n")


def labeled_images(
    folder: Path,
    split: str | None,
    name: str,
    config: FinetuneConfig | EvaluateConfig,
    run: RunFolder,
    world: World,
    *,
    view: EvalView,
    min_size: int,
) -> ImageFolder:
    """A folder's images for evaluation. ``name``: of the list that is kept with the run."""
    images = checked_images(folder, split, config, run, world, min_size=min_size, name=f"_{name}", labeled=True)
    loader, _ = choose_loader(config.loader, images=images, view=view, device=world.device)
    return ImageFolder(images, view, loader=loader, device=world.device)


def crop_share(crop_pct: float | None, image_size: int) -> float:
    """--crop-pct, or what the reference evaluates with: 224/256 below 384 pixels, the whole shorter side from there."""
    if crop_pct is not None:
        return crop_pct
    return 224 / 256 if image_size < 384 else 1.0


def validation_images(config: FinetuneConfig) -> tuple[Path, str | None] | None:
    """--val, or --data with its split, val or else test; None without either."""
    if config.val is not None:
        return config.val, None
    split = find_split(config.data, "val", "test")
    return None if split is None else (config.data, split)


class ClassifierValidation:
    """Evaluates at the ends of epochs: a line in the log, evaluation.jsonl and, in the end, results.json."""

    def __init__(self, config: FinetuneConfig, classes: list[str], run: RunFolder, world: World):
        self.config, self.run, self.world = config, run, world
        found = validation_images(config)
        assert found is not None
        folder, split = found
        view = EvalView(config.image_size, crop_share(config.crop_pct, config.image_size))
        self.dataset = labeled_images(folder, split, "val", config, run, world, view=view, min_size=config.patch_size)
        self.columns = columns_of(self.dataset.images, classes, self.dataset.images.root)
        self.best: str | None = None  # what was just evaluated, if nothing before was better

    def __call__(self, step: int, models: dict[str, nn.Module], progress: Callable[[], None]) -> dict[str, dict]:
        """The results by model, logged."""
        results = {
            name: evaluate_classifier(
                model,
                self.dataset,
                self.columns,
                self.world,
                batch_size=self.config.eval_batch_size,
                workers=self.config.workers,
                amp=autocast_dtype(self.config.precision, self.world.device),
                progress=progress,
            )
            for name, model in models.items()
        }
        for name, found in results.items():
            self.run.print(f"evaluation  step {step}  {name:<8} {top1_line(found, len(self.columns))}")
        self.run.metrics(
            step,
            {f"{name}_{key}": v for name, found in results.items() for key, v in found.items()},
            "evaluation.jsonl",
        )
        self._compare(step, {name: found["top1"] for name, found in results.items()})
        self.run.results({"step": step, "classes": len(self.columns), **results})
        return results

    def _compare(self, step: int, top1: dict[str, float]) -> None:
        name = max(top1, key=lambda name: top1[name])
        better = self.world.first(int(is_best(self.run.path, step, top1[name], "_top1")))  # rank 0 wrote its lines
        self.best = name if better else None


def top1_line(found: dict[str, float], classes: int) -> str:
    """A line of the log. Top-5 is left out for five classes or fewer, where it is always 1."""
    top5 = f"  top-5 {found['top5']:.2%}" if classes > 5 else ""
    return f"top-1 {found['top1']:.2%}{top5}  loss {found['loss']:.3f}  {found['images']:,} images"
