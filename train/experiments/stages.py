"""The trainings that the downstream table and the ablations put together, as steps of an experiment: small ones, or
with --model those of the paper's presets.

All of them see the same images in the same way; what differs is named in the call.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beitv2_fast.config.options import Options, option
from beitv2_fast.config.presets import PRETRAIN
from beitv2_fast.config.training import LOADERS
from beitv2_fast.train.experiments.runner import Step

SCENES = (
    "scenes to segment: a folder with train/images, train/masks and the same in val, or a packed file (with --model "
    "ADE20K's folder); 'none': no segmentation"
)


@dataclass(frozen=True)
class SmallScale(Options):
    """Sizes of the networks and lengths of the trainings; ``option``s, so commands can show and change them."""

    model: str = option(
        "none", "base or large: the paper's presets of that size, but for the epochs and what the options from "
        "--batch-size on say; none: small networks of the options up to --masked", choices=("none", "base", "large"),
    )  # fmt: skip
    image_size: int = option(96, "side of the images, in pixels", at_least=1)
    patch_size: int = option(16, "side of a patch, in pixels", at_least=1)
    dim: int = option(128, "width of the networks", at_least=1)
    depth: int = option(4, "transformer blocks", at_least=1)
    heads: int = option(2, "attention heads", at_least=1)
    num_codes: int = option(256, "size of the codebook", at_least=1)
    early_layer: int = option(3, "the aggregation branch reads the patches after this block", at_least=1)
    masked: float = option(0.4, "share of the patches that are masked", above=0, below=1)
    tokenizer_epochs: int = option(5, "passes of the tokenizer over the images", at_least=1)
    pretrain_epochs: int = option(6, "passes of each pre-training", at_least=1)
    finetune_epochs: int = option(3, "passes of each fine-tuning", at_least=1)
    segment_epochs: int = option(8, "passes of each segmentation over the scenes", at_least=1)
    probe_epochs: int = option(30, "passes of the linear probe over the cached features", at_least=1)
    batch_size: int = option(32, "images per step", at_least=1)
    quality_images: int = option(2000, "held-out images on which a tokenizer is judged", at_least=1)
    loader: str = option("auto", "what loads the images of all but the segmentations", choices=LOADERS)
    in_memory: bool = option(True, "decode the images once and keep them in memory")
    workers: int = option(0, "processes that load images, for each step", at_least=0)
    device: str = option(
        "auto", "what trains; auto: a CUDA or ROCm GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda")
    )
    jobs: int = option(
        0, "steps that run at once, each with its share of the cores; 0: one per core on the CPU, one on a GPU",
        at_least=0,
    )  # fmt: skip

    def patches(self, share: float) -> int:
        """So many of an image's patches."""
        shape = self if self.model == "none" else PRETRAIN[self.model]
        return max(round(share * (shape.image_size // shape.patch_size) ** 2), 1)

    @property
    def steps_at_once(self) -> int:
        """See ``run_steps``."""
        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return self.jobs or int(on_gpu)


def flags(**values: Any) -> list[str]:
    """Options of a command: ``dim=64`` -> --dim 64, ``exact=False`` -> --no-exact, tuples as several words."""
    found = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words = value if isinstance(value, tuple | list) else (value,)
            found += [f"--{flag}", *map(str, words)]
    return found


@dataclass(frozen=True)
class Stages:
    """Steps of the trainings. root: the experiment's folder, images: with train/CLASS and val/CLASS.

    Every method takes further options of the command it runs, which replace the scale's.
    """

    root: Path
    images: Path
    scale: SmallScale
    teacher_cache: Path | None = None  # none: in root

    def _step(
        self, script: str, name: str, needs: tuple[str, ...], values: dict[str, Any], preset: str | None = None
    ) -> Step:
        preset = preset or ("demo" if self.scale.model == "none" else self.scale.model)
        command = [sys.executable, "-m", f"beitv2_fast.train.{script}", "--preset", preset]
        where = {"device": self.scale.device, "workers": self.scale.workers, "out": self.root / name}
        return Step(name, tuple([*command, *flags(**values, **where)]), needs)

    def _network(self, small: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Options of a training. small: those that the paper's presets have other values of."""
        s = self.scale
        saving = {"log_every": 50, "save_every": 250, "keep_checkpoints": 1}
        loading = {"batch_size": s.batch_size, "loader": s.loader, "in_memory": s.in_memory}
        found = {"data": self.images, **loading, **saving, **values}
        if s.model != "none":
            return found
        shape = {name: getattr(s, name) for name in ("image_size", "patch_size", "dim", "depth", "heads")}
        return {**found, **shape, **small}

    def tokenizer(self, name: str, seed: int, **options: Any) -> Step:
        s = self.scale
        small = dict(
            teacher="efficientnet_lite0", teacher_image_size=s.image_size, views=1,
            teacher_cache=self.teacher_cache or self.root / "teacher_features", crop_scale=(0.35, 1.0),
            num_codes=s.num_codes, code_dim=32, decoder_depth=1, lr=7e-4,
        )  # fmt: skip
        values = self._network(small, seed=seed, epochs=s.tokenizer_epochs)
        return self._step("tokenizer", name, (), {**values, **options})

    def quality(self, name: str, tokenizer: str) -> Step:
        values = {"run": self.root / tokenizer, "data": self.images, "max_images": self.scale.quality_images}
        return self._step("tokenizer_quality", name, (tokenizer,), values, "base")

    def pretrain(self, name: str, tokenizer: str, seed: int, **options: Any) -> Step:
        s = self.scale
        small = dict(
            early_layer=s.early_layer, num_masked=s.patches(s.masked), min_mask_patches=4, crop_scale=(0.35, 1.0),
            lr=1e-3, warmup_epochs=1,
        )  # fmt: skip
        values = self._network(small, seed=seed, tokenizer=self.root / tokenizer, epochs=s.pretrain_epochs)
        return self._step("pretrain", name, (tokenizer,), {**values, **options})

    def probe(self, name: str, run: str, seed: int, backbone: str = "trained") -> Step:
        values = {
            "run": self.root / run, "backbone": backbone, "data": self.images, "seed": seed,
            "epochs": self.scale.probe_epochs, "learning_rates": (0.01, 0.03, 0.1, 0.3), "shots": (10,),
        }  # fmt: skip
        return self._step("linear_probe", name, (run,), values, "base")

    def finetune(self, name: str, run: str | None, seed: int, **options: Any) -> Step:
        """run: whose backbone; None: random weights."""
        small = dict(
            lr=1e-3, layer_decay=0.8, crop_scale=(0.35, 1.0), augment_ops=0, mixup=0.0, cutmix=0.0, erasing=0.0,
            ema_decay=0.0,
        )  # fmt: skip
        weights = "none" if run is None else self.root / run
        values = self._network(small, seed=seed, weights=weights, epochs=self.scale.finetune_epochs, eval_every=1000)
        return self._step("finetune", name, () if run is None else (run,), {**values, **options})

    def segment(self, name: str, scenes: Path, run: str | None, seed: int, **options: Any) -> Step:
        """run: whose backbone; None: random weights."""
        s = self.scale
        small = {"image_size": 160 // s.patch_size * s.patch_size, "base_size": 240, "batch_size": 8}
        values = self._network(
            small, data=scenes, seed=seed, weights="none" if run is None else self.root / run, steps=0,
            epochs=s.segment_epochs, eval_every=1000, overlays=2, loader="auto",
        )  # fmt: skip
        return self._step("segment", name, () if run is None else (run,), {**values, **options})


def step_result(root: Path, name: str) -> dict[str, Any] | None:
    """results.json of a step; None if there is none."""
    file = root / name / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


def probe_numbers(found: dict[str, Any], neighbors: str = "10") -> dict[str, float]:
    """Of a probe: top-1 of the linear probe and of k-NN, of the CLS token and of the mean of the patches."""
    numbers: dict[str, float] = {}
    for row in found["rows"]:
        kind = "cls" if row["features"].endswith("CLS token") else "mean"
        numbers |= {f"probe_{kind}": row["mean"], f"knn_{kind}": row["knn"][neighbors]}
    return numbers
