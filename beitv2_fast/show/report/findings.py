"""Everything that a report tells: what the run folders say, and what the models do with the photographs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.show import ReportConfig
from ...data.find import find_images, held_out_images
from ...data.images import ImageFolder, ImageList
from ...errors import UserError
from ...models.student import Student
from ...models.tokenizer import Tokenizer
from ...pictures import code_colors
from ...runs.logs import Start, read_logs, read_starts
from ...teachers.base import Teacher
from ...weights.build import load_teacher
from ..codes import CodeUsage, encode_images
from ..guesses import Guesses, guess_hidden, pretrain_view
from ..runs import check_belong, readable_sample
from .downstream import Downstream, read_downstream
from .stages import Stage, read_results, read_stage

_log = logging.getLogger(__name__)


@dataclass
class Findings:
    """What is known; tensors are None where the model they come from is missing.

    data: the folder of the images. images: those of the codebook's statistics, a sample of ``total_images``; codes:
    theirs, [images, N]; colors: [K, 3]. shown: those of the examples, which the trainings did not see if ``held_out``;
    guesses: of their hidden patches, on the crops of ``pretrain_view``. teacher: the tokenizer's. compared: metrics by
    name of a run. starts: of each stage, what its log says.
    """

    tokenizer: Stage
    pretrain: Stage
    results: dict[str, Any] | None
    no_results: str | None
    data: Path
    images: ImageList
    total_images: int
    held_out: bool = False
    codes: Tensor | None = None
    usage: CodeUsage | None = None
    colors: Tensor = field(default_factory=lambda: torch.empty(0, 3))
    shown: ImageList = field(default_factory=lambda: ImageList(Path(), []))
    guesses: Guesses | None = None
    teacher: Teacher | None = None
    no_teacher: str | None = None
    downstream: list[Downstream] = field(default_factory=list)
    compared: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    starts: dict[str, list[Start]] = field(default_factory=dict)

    @property
    def hidden_usage(self) -> CodeUsage | None:
        """How often each code is asked for on the pre-training's crops: what a guess can know without looking."""
        if self.guesses is None or self.usage is None:
            return None
        counts = torch.bincount(self.guesses.codes[self.guesses.masks], minlength=self.usage.num_codes)
        return CodeUsage(counts)

    def problems(self) -> list[str]:
        """What is missing, one sentence or two each."""
        found = [self.tokenizer.problem, self.pretrain.problem, self.no_results, self.no_teacher]
        found += [run.problem for run in self.downstream]
        found += [f"{name} has no training log (metrics.jsonl)." for name, lines in self.compared.items() if not lines]
        return [problem for problem in found if problem is not None]


def gather(config: ReportConfig, device: torch.device) -> Findings:
    """Read the runs, and run the models on the photographs.

    Raises:
        UserError: nothing to report on, runs of the wrong kind or that do not belong together, no images.
    """
    tokenizer, pretrain = read_stage(config.tokenizer, Tokenizer), read_stage(config.pretrain, Student)
    results, no_results = read_results(config.probe)
    anything = (tokenizer.model, tokenizer.metrics, pretrain.model, pretrain.metrics, results, config.downstream)
    if not any(anything):
        raise UserError(
            f"There is nothing to report on. {tokenizer.problem} {pretrain.problem} {no_results} "
            "Name run folders with --tokenizer, --pretrain and --probe."
        )
    trained = [stage.config.data for stage in (pretrain, tokenizer) if stage.config is not None and stage.own_options]
    data = next(iter([config.data] if config.data else trained), None)
    if data is None:
        raise UserError("Nothing says which images these runs had. Name their folder with --data.")
    images = find_images(data, "train")
    _log.info(images.summary)
    found = Findings(tokenizer, pretrain, results, no_results, data, images, len(images))
    found.downstream = [read_downstream(run) for run in config.downstream]
    found.compared = read_logs(config.compare)
    runs = {"tokenizer": config.tokenizer, "pre-training": config.pretrain, "probe": config.probe}
    runs |= {run.name: run for run in config.downstream}
    found.starts = {name: starts for name, run in runs.items() if (starts := read_starts(run))}
    if tokenizer.model is not None:
        if pretrain.model is not None:
            check_belong(tokenizer.model, pretrain.model)
        _add_codes(found, config, device)
        if pretrain.model is not None:
            _add_guesses(found, config, device)
        if config.teacher and config.examples:
            _add_teacher(found, device)
    return found


def _add_codes(found: Findings, config: ReportConfig, device: torch.device) -> None:
    model: Tokenizer = found.tokenizer.model.to(device)
    found.images = _readable(found.images, config, model.patch_size)
    found.codes = encode_images(model, found.images, device, config.batch_size, config.workers)
    found.usage = CodeUsage(torch.bincount(found.codes.flatten(), minlength=model.num_codes))
    found.colors = code_colors(model.quantize.codebook.cpu(), found.usage.counts)
    held_out = held_out_images(found.data)
    found.held_out = held_out is not None
    found.shown = found.images if held_out is None else _readable(held_out, config, model.patch_size)


def _add_guesses(found: Findings, config: ReportConfig, device: torch.device) -> None:
    tokenizer, student, trained = found.tokenizer.model, found.pretrain.model.to(device), found.pretrain.config
    view = pretrain_view(trained, trained.image_size, tokenizer.config.encoder.image_size)
    dataset = ImageFolder(found.shown, view, config.seed)
    found.guesses = guess_hidden(student, tokenizer, dataset, device, config.batch_size, config.workers)


def _add_teacher(found: Findings, device: torch.device) -> None:
    """A report does without a teacher whose weights are not there."""
    if found.tokenizer.config is None:
        found.no_teacher = "Nothing says which teacher the tokenizer had."
        return
    try:
        found.teacher = load_teacher(found.tokenizer.config, found.tokenizer.model).to(device)
    except UserError as error:
        found.no_teacher = f"The tokenizer's teacher cannot be loaded: {error}"


def _readable(images: ImageList, config: ReportConfig, min_size: int) -> ImageList:
    return readable_sample(
        images, config.max_images, config.seed, min_size=min_size, how=config.check, workers=config.workers
    )
