"""What the report tells of: run folders, interrupted or incomplete ones too, and the codes of the photographs."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build import load_run_model
from ..config import PretrainConfig
from ..data import ImageFolder, eval_loader
from ..errors import UserError, require
from ..images import ImageList, find_images, find_split
from ..student import Student
from ..tokenizer import Tokenizer
from ..transforms import EvalView, PretrainView

HELD_OUT = ("test", "val")
BRANCHES = ("last layer", "aggregation branch")


@dataclass
class Stage:
    """One training: its model and config where there are any, its log, and in words what is missing."""

    model: Any = None
    config: Any = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    problem: str | None = None

    @property
    def unfinished(self) -> str | None:
        """How far a training that has not reached its last epoch has come."""
        if self.config is None or not self.metrics:
            return None
        epoch = self.metrics[-1].get("epoch", self.config.epochs)
        return f"epoch {epoch:.1f} of {self.config.epochs}" if epoch < self.config.epochs - 1e-6 else None


def read_stage(run: Path | None, kind: type[Tokenizer] | type[Student]) -> Stage:
    """A tokenizer's or a pre-training's run folder; what is not there becomes ``problem``.

    Raises:
        UserError: the folder is a run of the other kind.
    """
    if run is None:
        return Stage(problem="No run folder was named for this stage.")
    metrics = read_metrics(run)
    try:
        model, config = load_run_model(run)
    except UserError as error:
        return Stage(metrics=metrics, problem=str(error))
    if not isinstance(model, kind):
        wanted, found = ("tokenizer", "pre-training") if kind is Tokenizer else ("pre-training", "tokenizer")
        raise UserError(f"{run} is the run folder of a {found}, where that of a {wanted} was expected. Swap the two?")
    return Stage(model.requires_grad_(False), config, metrics)


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    """The lines of metrics.jsonl, or of another such file, by step.

    A resumed run repeats steps: the last line counts; a cut line does not.
    """
    by_step: dict[int, dict[str, float]] = {}
    file = run / name
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
            by_step[int(values["step"])] = values
        except (ValueError, KeyError, TypeError):
            continue
    return [by_step[step] for step in sorted(by_step)]


def read_logs(runs: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    """``read_metrics`` of several runs by the ends of their paths, as long as it takes to tell them apart.

    Raises:
        UserError: a run is named twice.
    """
    return {name: read_metrics(run) for name, run in zip(short_names(runs), runs, strict=True)}


def short_names(runs: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart."""
    whole = [run.resolve().parts for run in runs]
    if len(set(whole)) < len(whole):
        raise UserError("a run is named twice. Name each once.")
    length = next(
        n for n in range(1, max(map(len, whole), default=1) + 1) if len({p[-n:] for p in whole}) == len(whole)
    )
    return ["/".join(parts[-length:]) for parts in whole]


def read_results(probe: Path | None) -> tuple[dict[str, Any] | None, str | None]:
    """(what linear_probe.py wrote, None), or (None, why there is nothing)."""
    file = None if probe is None else probe / "results.json"
    if file is None or not file.is_file():
        return None, f"The probe has not been run yet: there is no {file or 'results.json'}."
    try:
        results = json.loads(file.read_text())
        if not all({"features", "mean", "std"} <= row.keys() for row in results["rows"]):
            raise ValueError("its rows lack features, mean or std")
        return results, None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{file} cannot be read: {error}"


def held_out_images(data: Path) -> ImageList | None:
    """The images of the split test, or else val; None if there is neither."""
    split = find_split(data, *HELD_OUT)
    return None if split is None else find_images(data, split)


def sample_images(images: ImageList, count: int, seed: int) -> list[int]:
    """Indices of at most ``count`` images, drawn class by class in turn, so that a few show every class; sorted."""
    by_class = defaultdict(list)
    for i in range(len(images)):
        by_class[0 if images.labels is None else images.labels[i]].append(i)
    generator = random.Random(seed)
    for members in by_class.values():
        generator.shuffle(members)
    return sorted(_in_turns([by_class[label] for label in sorted(by_class)])[:count])


def choose_patches(codes: Tensor, code: int, count: int, seed: int) -> list[tuple[int, int]]:
    """(image, patch) of ``count`` occurrences of a code in codes [images, N], from as many images as possible."""
    generator = random.Random(f"{seed} {code}")
    by_image = defaultdict(list)
    for image, patch in (codes == code).nonzero().tolist():
        by_image[image].append((image, patch))
    found = list(by_image.values())
    generator.shuffle(found)
    for patches in found:
        generator.shuffle(patches)
    return _in_turns(found)[:count]


def choose_codes(usage: CodeUsage, rows: int) -> tuple[list[int], int]:
    """(codes of a sheet, how many of them are the most frequent): half of the rows, then an even spread by rank."""
    ranking = usage.ranking[: usage.used].tolist()
    if len(ranking) <= rows:
        return ranking, len(ranking)
    top = (rows + 1) // 2
    rest, spread = ranking[top:], rows - top
    return ranking[:top] + [rest[round((k + 0.5) * len(rest) / spread - 0.5)] for k in range(spread)], top


def _in_turns(lists: list[list]) -> list:
    """The first of each list, then the second of each, and so on."""
    return [item for turn in itertools.zip_longest(*lists) for item in turn if item is not None]


@torch.inference_mode()
def encode_images(tokenizer: Tokenizer, images: ImageList, device: torch.device, batch: int, workers: int) -> Tensor:
    """The codes of the centre square of every image: [images, N] int64."""
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    loader = eval_loader(ImageFolder(images, EvalView(tokenizer.config.encoder.image_size, 1.0)), batch, workers)
    bar = tqdm(loader, desc="report: codes of the photographs", unit="batch", dynamic_ncols=True)
    return torch.cat([tokenizer.encode(found["image"].to(device)).cpu() for found in bar])


@dataclass(frozen=True)
class CodeUsage:
    """How often each code occurs: counts [K] int64."""

    counts: Tensor

    @property
    def num_codes(self) -> int:
        return len(self.counts)

    @property
    def used(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def shares(self) -> Tensor:
        return self.counts.double() / self.counts.sum().clamp(min=1)

    @property
    def entropy(self) -> float:
        """In nats: the cross entropy of a guess that knows the frequencies alone."""
        return float(-torch.special.xlogy(self.shares, self.shares).sum())

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.entropy).exp())

    @property
    def ranking(self) -> Tensor:
        """Codes by falling frequency, the lower id first among equals."""
        return self.counts.argsort(descending=True, stable=True)

    def covering(self, share: float) -> int:
        """The least number of codes that make up this share of all patches."""
        return int((self.shares[self.ranking].cumsum(0) < share - 1e-12).sum()) + 1


@dataclass(frozen=True)
class Guesses:
    """The student's guesses of hidden codes, on crops and masks like those of its training.

    masks: [images, N] bool. codes: the tokenizer's, [images, N] int64. guesses: the last layer's first ones, for every
    patch. right: by branch, the shares of hidden patches whose code is the first guess, and among the first five.
    """

    masks: Tensor
    codes: Tensor
    guesses: Tensor
    right: dict[str, tuple[float, float]]


def pretrain_view(config: PretrainConfig, student_size: int, tokenizer_size: int) -> PretrainView:
    """The crops, flips and masks of a pre-training, without colour jitter; the sizes change nothing about them."""
    side = config.image_size // config.patch_size
    return PretrainView(
        student_size=student_size,
        tokenizer_size=tokenizer_size,
        mask_grid=(side, side),
        num_masked=config.num_masked,
        min_mask_patches=config.min_mask_patches,
        crop_scale=config.crop_scale,
        color_jitter=0.0,
        mask_kind=config.mask,
    )


@torch.inference_mode()
def guess_hidden(
    student: Student,
    tokenizer: Tokenizer,
    dataset: ImageFolder,
    device: torch.device,
    batch: int,
    workers: int,
) -> Guesses:
    """dataset: images with a ``pretrain_view``."""
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    masks, codes, guesses, hits = [], [], [], []  # hits: by batch [branches, 2, hidden patches]
    loader = eval_loader(dataset, batch, workers)
    for found in tqdm(loader, desc="report: hidden patches", unit="batch", dynamic_ncols=True):
        mask, true = found["mask"], tokenizer.encode(found["tokenizer"].to(device)).cpu()
        logits = [x.cpu() for x in student.predict(found["student"].to(device), mask.to(device))]
        best = [x[mask].topk(min(5, x.shape[-1]), dim=-1).indices == true[mask][:, None] for x in logits]
        hits.append(torch.stack([torch.stack([hit[:, 0], hit.any(-1)]) for hit in best]))
        for values, value in ((masks, mask), (codes, true), (guesses, logits[0].argmax(-1))):
            values.append(value)
    shares = torch.cat(hits, dim=-1).double().mean(-1).tolist()
    right = {name: tuple(share) for name, share in zip(BRANCHES, shares, strict=False)}
    return Guesses(torch.cat(masks), torch.cat(codes), torch.cat(guesses), right)
