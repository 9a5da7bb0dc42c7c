"""The sections of ``python -m bench.gpu``: what each is for, and how long it may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TINY_SECONDS = 300.0  # the limit of every section at tiny sizes
LEAST_SECONDS = 10.0  # with fewer left a section is not begun


@dataclass(frozen=True)
class Section:
    """``module.function`` of this package. limit: seconds after which it is ended; 0: whatever time is left."""

    name: str
    module: str
    limit: float
    what: str

    def load(self) -> Callable[[Any], None]:
        return getattr(importlib.import_module(f"bench.gpu.{self.module}"), self.name)


SECTIONS = (
    Section("env", "card", 40, "the card, its software, its copy and product rates"),
    Section("correct", "correct", 90, "whole models: losses and gradients against the CPU"),
    Section("tests", "checks", 200, "pytest -m gpu in 12 processes"),
    Section("search", "ops", 40, "codebook_search beside its peers"),
    Section("vectors", "ops", 40, "the search on vectors as they are: features, cones, duplicates, NaN"),
    Section("quantizer", "ops", 30, "codebook_update and the quantizer's step beside their peers"),
    Section("head", "head", 60, "the masked-token head beside its peers"),
    Section("kernels", "ops", 40, "the time of every kernel of an op"),
    Section("sanitizer", "checks", 110, "compute-sanitizer: memcheck and racecheck over every kernel"),
    Section("norm", "norm", 50, "residual, layer scale, drop path and LayerNorm beside torch.compile"),
    Section("masks", "ops", 30, "block masks and masked_gather"),
    Section("scaling", "ops", 40, "the search as N, K and D grow"),
    Section("attention", "attention", 70, "attention with a learned bias, by each implementation"),
    Section("steps", "models", 150, "training steps beside the reference's structure"),
    Section("profile", "models", 45, "where the time of a step goes"),
    Section("forms", "ops", 40, "a step of every form of the quantizer, before and after replace_quantizers"),
    Section("files", "trainings", 110, "both trainings from image files, with the loaders that are there"),
    Section("compiled", "models", 130, "training steps under torch.compile"),
    Section("learn", "learning", 0, "does it learn: tokenizer, students, probes, fine-tuning"),
    Section("tune", "tune", 60, "launch shapes of the kernels beside the ones they have"),
    Section("xformers", "attention", 40, "xformers is installed, and chosen"),
    Section("teacher", "models", 50, "CLIP's teacher of open_clip, random weights"),
    Section("dali", "trainings", 90, "loaders of pre-training views: pixels and images/s"),
    Section("deepspeed", "trainings", 170, "deepspeed train/pretrain.py under ZeRO 0 to 3"),
    Section("demo", "trainings", 200, "the demo, from photographs to its table"),
)
BY_NAME = {section.name: section for section in SECTIONS}


def chosen(names: Sequence[str]) -> list[Section]:
    """Sections in the order of their names.

    Raises:
        KeyError: an unknown section, named with those that there are.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise KeyError(f"unknown sections: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]


def reason_to_skip(left: float, tiny: bool) -> str | None:
    """Why no section is begun with so many seconds left; None if one is."""
    return None if tiny or left >= LEAST_SECONDS else f"no time: {max(left, 0):.0f} s are left"


def limit_of(section: Section, left: float, tiny: bool) -> float:
    """Seconds after which a section is ended."""
    return min(left, TINY_SECONDS if tiny else section.limit or left)
