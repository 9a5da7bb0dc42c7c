"""Linear probe of a pre-trained backbone: `python train/linear_probe.py --run RUN --data FOLDER --out RUN`.

Beside it, the same probe on what a representation has to beat: the untrained backbone and raw pixels, and on the
teacher's features, from which the tokenizer learnt.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from beitv2_fast.build import build_student, load_run_model
from beitv2_fast.config import PretrainConfig, ProbeConfig, TokenizerConfig, parse
from beitv2_fast.data import (
    EvalView,
    ImageFolder,
    ImageList,
    check_images,
    eval_loader,
    find_images,
)
from beitv2_fast.distributed import run_main, start
from beitv2_fast.errors import UserError
from beitv2_fast.presets import PROBE
from beitv2_fast.probe import ProbeResult, linear_probe
from beitv2_fast.run import RunFolder, read_config, write_atomically
from beitv2_fast.student import Student
from beitv2_fast.teachers import create_teacher
from beitv2_fast.transforms import normalise

PIXELS = 32  # side of the images whose raw pixels are probed
Split = dict[str, ImageList]
Features = dict[str, Tensor]  # by split


KINDS = {"cls": "CLS token", "mean": "mean of patches"}


def student_features(model: Student) -> Callable[[Tensor], Tensor]:
    """Images [B, 3, H, W] in [0, 1] -> normed global features [B, 2, C], in the order of ``KINDS``."""

    def features(images: Tensor) -> Tensor:
        last, aggregated = model.encode(normalise(images))
        norm, _ = model.aggregation_head
        cls = norm((last if aggregated is None else aggregated)[:, 0])
        return torch.stack([cls, model.norm(last[:, 1:]).mean(1)], dim=1)

    return features


class Extractor:
    """Runs a feature function over both splits."""

    def __init__(self, splits: Split, config: ProbeConfig, device: torch.device):
        self.splits, self.config, self.device = splits, config, device

    @torch.inference_mode()
    def __call__(self, name: str, size: int, function: Callable[[Tensor], Tensor]) -> Features:
        from tqdm import tqdm

        result = {}
        for split, images in self.splits.items():
            batches: Iterator[dict[str, Tensor]] = eval_loader(
                ImageFolder(images, EvalView(size, 1.0)), self.config.batch_size, self.config.workers
            )
            bar = tqdm(batches, desc=f"{name} ({split})", unit="batch", leave=False, dynamic_ncols=True)
            result[split] = torch.cat([function(b["image"].to(self.device)).float().cpu() for b in bar])
        return result


def find_labelled(config: ProbeConfig, run: RunFolder, min_size: int) -> Split:
    test = "test" if (config.data / "test").is_dir() else "val"
    splits = {}
    for split, folder in (("train", "train"), ("test", test)):
        if not (config.data / folder).is_dir():
            raise UserError(f"{config.data} needs the folders train/CLASS and test/CLASS (or val/CLASS) for a probe")
        splits[split] = check_images(
            find_images(config.data, folder),
            cache=run.path / f"images_{split}.json",
            min_size=min_size,
            workers=config.workers,
        )
    if splits["train"].labels is None or len(splits["train"].classes) < 2:
        raise UserError(f"{config.data}/train needs at least two class folders for a probe")
    for images in splits.values():
        empty = [name for i, name in enumerate(images.classes) if i not in images.labels]
        if empty:
            raise UserError(
                f"no image of the classes {', '.join(empty)} in {images.root} can be used; add some ({split})"
            )
    if splits["train"].classes != splits["test"].classes:
        raise UserError(
            f"train has the classes {splits['train'].classes}, {test} has {splits['test'].classes}: "
            "they must be the same"
        )
    return splits


def rows(config: ProbeConfig, pretrain: PretrainConfig, extract: Extractor, model: Student) -> Iterator[tuple]:
    """(name, seed -> features by split) of every row of the table."""
    trained = extract("pre-trained", pretrain.image_size, student_features(model))

    @functools.cache
    def untrained(seed: int) -> Features:
        torch.manual_seed(1000 + seed)
        fresh = build_student(pretrain, model.config.num_codes).to(extract.device).eval()
        return extract("untrained", pretrain.image_size, student_features(fresh))

    for name, features in (("pre-trained", lambda seed: trained), ("untrained", untrained)):
        for column, (kind, title) in enumerate(KINDS.items()):
            if config.features in ("auto", kind):
                yield (
                    f"{name}, {title}",
                    lambda seed, f=features, c=column: {split: x[:, c] for split, x in f(seed).items()},
                )
    found = extract("pixels", PIXELS, lambda images: images.flatten(1))
    yield f"pixels, {PIXELS}x{PIXELS}", lambda seed, found=found: found
    if config.tokenizer is not None:
        stored = read_config(TokenizerConfig, config.tokenizer)
        grid = (stored.image_size // stored.patch_size,) * 2
        teacher = create_teacher(stored.teacher, grid, stored.teacher_weights).to(extract.device)
        view = stored.teacher_image_size or stored.image_size
        found = extract("teacher", view, lambda images: teacher(images, grid).mean(1))
        yield f"teacher ({stored.teacher}), mean of patches", lambda seed, found=found: found


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(ProbeConfig, PROBE, argv)
    world = start(config.device)
    model, pretrain = load_run_model(config.run)
    if not isinstance(model, Student):
        raise UserError(f"--run {config.run} is the run folder of a tokenizer; the probe needs a pre-training's")
    model.to(world.device)
    if config.tokenizer is not None:
        read_config(TokenizerConfig, config.tokenizer)  # now, not after the other features have been computed
    run = RunFolder(config, world.rank)
    splits = find_labelled(config, run, pretrain.patch_size)
    labels = {split: torch.tensor(images.labels) for split, images in splits.items()}
    seeds = range(config.seed, config.seed + config.seeds)
    results: list[ProbeResult] = []
    for name, features in rows(config, pretrain, Extractor(splits, config, world.device), model):

        def both(seed: int, features: Callable[[int], Features] = features) -> tuple[Tensor, Tensor]:
            found = features(seed)
            return found["train"], found["test"]

        result = linear_probe(name, both, labels["train"], labels["test"], seeds)
        results.append(result)
        run.print(f"probe  {name:<42} {result.mean:.3f} ± {result.std:.3f}")
    classes = splits["train"].classes
    write_atomically(
        run.path / "results.json",
        json.dumps(
            {
                "task": f"which of {len(classes)} classes: {', '.join(classes[:10])}",
                "metric": "balanced accuracy",
                "chance": 1 / len(classes),
                "seeds": config.seeds,
                "images": {split: len(images) for split, images in splits.items()},
                "rows": [{"features": r.features, "mean": r.mean, "std": r.std, "runs": r.runs} for r in results],
                "notes": ["The teacher was trained with ImageNet's labels; nothing else here saw a label."],
            },
            indent=2,
        )
        + "\n",
    )
    run.print(f"probe: done; {run.path / 'results.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
