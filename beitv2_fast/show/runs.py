"""Which models and images a RUN stands for, and what is missing, in words that the page shows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config.show import ExploreConfig
from ..config.training import PretrainConfig, TokenizerConfig
from ..data.check import check_images
from ..data.find import find_images, held_out_images, sample_images
from ..data.images import ImageList
from ..distributed import start
from ..errors import UserError
from ..models.features import features
from ..models.student import Student
from ..models.tokenizer import Tokenizer
from ..runs.folder import CONFIG
from ..runs.sources import is_remote
from ..teachers.base import Teacher
from ..weights.build import load_teacher
from ..weights.create import open_model, tokenizer_of
from .sheets import squares

_log = logging.getLogger(__name__)

SAMPLES = 24
NO_STUDENT = "There is no pre-training here, so there is no mask game: it needs a student that predicts hidden tokens."


@dataclass
class Runs:
    """The models in eval mode on their device, and the images: all are compared with, ``samples`` are offered.

    problem: why there is no student, if there is none. settings: of its training.
    """

    name: str
    tokenizer: Tokenizer
    student: Student | None
    settings: PretrainConfig | None
    teacher: Teacher | None
    teacher_size: int
    images: ImageList
    samples: ImageList
    held_out: bool
    device: torch.device
    problem: str | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return self.tokenizer.grid

    def views(self, photos: Iterable[Image.Image]) -> Views:
        """The center squares of photographs, at the sizes that the models read."""
        photos = list(photos)
        sizes = {"tokenizer": self.tokenizer.config.encoder.image_size}
        if self.student is not None:
            sizes["student"] = self.student.vit_config.image_size
        if self.teacher is not None:
            sizes["teacher"] = self.teacher_size
        of_size = {size: torch.stack(squares(photos, size)).to(self.device) for size in set(sizes.values())}
        return Views(self, {name: of_size[size] for name, size in sizes.items()})


@dataclass(frozen=True)
class Views:
    """Images as each model reads them, [B, 3, S, S] in [0, 1]."""

    runs: Runs
    of: dict[str, Tensor]

    @torch.no_grad()
    def codes(self) -> Tensor:
        """[B, N] int64."""
        return self.runs.tokenizer.encode(self.of["tokenizer"]).cpu()

    @torch.no_grad()
    def features(self, model: str) -> Tensor:
        """Of every patch by the student, the tokenizer's encoder or the teacher: [B, N, C], unit length."""
        if self.runs.teacher is not None and model == "teacher":
            found = self.runs.teacher(self.of["teacher"], self.runs.grid)
        else:
            found = features(getattr(self.runs, model), self.of[model]).patches
        return F.normalize(found.float(), dim=-1).cpu()

    def similarity(self) -> Tensor:
        """Cosine between what the tokenizer's decoder makes of the codes and the teacher's features: [B, N]."""
        assert self.runs.teacher is not None
        target = self.runs.teacher(self.of["teacher"], self.runs.grid)
        return self.runs.tokenizer.similarity(self.of["tokenizer"], target).cpu()


def open_runs(run: Path, config: ExploreConfig, *, with_images: bool = True) -> Runs:
    """Load what RUN stands for; ``with_images``: its images too, else there are none.

    Raises:
        UserError: no run there, runs that do not belong together, no images, a teacher that cannot be loaded.
    """
    folder, settings, student, problem = _find(run)
    device = start(config.device).device
    tokenizer, stored = open_model(folder)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{folder} holds a {type(tokenizer).__name__.lower()}, where a tokenizer was expected.")
    assert stored is None or isinstance(stored, TokenizerConfig)
    if student is not None:
        check_belong(tokenizer, student)
    teacher = _teacher(stored, folder, tokenizer) if config.teacher else None
    images, samples, held_out = ImageList(run, []), ImageList(run, []), False
    if with_images:
        images, samples, held_out = _images(config, run, [c for c in (settings, stored) if c is not None], tokenizer)
    for model in (tokenizer, student, teacher):
        if model is not None:
            model.to(device).requires_grad_(False)
    size = 0 if stored is None else stored.teacher_image_size or stored.image_size
    return Runs(
        run.name or str(run), tokenizer, student, settings, teacher, size, images, samples, held_out, device, problem
    )


def _find(run: Path) -> tuple[Path, PretrainConfig | None, Student | None, str | None]:
    """(the tokenizer's run folder or file, the pre-training's config and model, why there is none)"""
    if (run / CONFIG).is_file() or run.is_file() or is_remote(run):
        model, config = open_model(run)
        if isinstance(model, Tokenizer):
            return run, None, None, NO_STUDENT
        if not isinstance(model, Student):
            raise UserError(f"{run} is the run of a fine-tuning. Name a tokenizer's run folder or a pre-training's.")
        if not isinstance(config, PretrainConfig):
            raise UserError(f"nothing says whose codes the student {run} predicts. Name its run folder.")
        return tokenizer_of(run, config), config, model, None
    if not (run / "tokenizer" / CONFIG).is_file():
        found = f"has neither a {CONFIG} nor a folder tokenizer with one" if run.exists() else "does not exist"
        raise UserError(
            f"{run} is no run: it {found}. Name the folder in which `make demo` worked (runs/demo), or the run folder "
            "of a tokenizer or a pre-training."
        )
    if not (run / "pretrain" / CONFIG).is_file():
        return run / "tokenizer", None, None, NO_STUDENT
    try:
        model, config = open_model(run / "pretrain")
    except UserError as error:  # a training that has just begun: the tokens can be looked at already
        return run / "tokenizer", None, None, f"{NO_STUDENT} ({error})"
    return run / "tokenizer", cast(PretrainConfig, config), cast(Student, model), None


def check_belong(tokenizer: Tokenizer, student: Student) -> None:
    """UserError if the student was not trained on this tokenizer's codes."""
    ours, theirs = (tokenizer.num_codes, tokenizer.grid), (student.config.num_codes, student.grid)
    if ours != theirs:
        raise UserError(
            f"The tokenizer has {ours[0]} codes on a grid of {ours[1]}, the pre-training predicts {theirs[0]} on "
            f"{theirs[1]}: they do not belong together. Name the tokenizer that the pre-training used, or only the "
            "pre-training's own folder, which says it."
        )


def _teacher(stored: TokenizerConfig | None, folder: Path, tokenizer: Tokenizer) -> Teacher:
    if stored is None:
        raise UserError(f"--teacher: {folder} is no run folder, so it does not say which teacher it had. Leave it out.")
    try:
        return load_teacher(stored, tokenizer)
    except UserError as error:
        raise UserError(f"--teacher: {str(error).rstrip('.')}. Leave --teacher out.") from error


def _images(
    config: ExploreConfig, run: Path, stored: list[PretrainConfig | TokenizerConfig], tokenizer: Tokenizer
) -> tuple[ImageList, ImageList, bool]:
    """The images to compare with, those offered on the page, and whether the latter were kept from the trainings."""
    places = [config.data] if config.data else [*(c.data for c in stored), run / "data", run.parent / "data"]
    data = next((place for place in places if place.exists()), None)
    if data is None:
        raise UserError(f"The run's images are not at {places[0]}. Name a folder of images with --data.")
    found = find_images(data, "train")
    _log.info(found.summary)
    held_out = held_out_images(data)
    smallest = tokenizer.patch_size
    images = readable_sample(found, config.max_images, config.seed, min_size=smallest)
    if held_out is None:
        return images, images.subset(sample_images(images, SAMPLES, config.seed)), False
    return images, readable_sample(held_out, SAMPLES, config.seed, min_size=smallest), True


def readable_sample(
    images: ImageList, count: int, seed: int, *, min_size: int, how: str = "decode", workers: int = 0
) -> ImageList:
    """At most ``count`` of the images, drawn by seed, without those that ``check_images`` leaves out."""
    chosen = images.subset(sample_images(images, count, seed))
    return check_images(chosen, cache=None, min_size=min_size, how=how, workers=workers)
