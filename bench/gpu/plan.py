"""The sections of ``python -m bench.gpu``: what each is for, how long it may take, and which of them fit in a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PART_MINUTES = {"A": 5.0, "B": 5.0, "C": 8.0, "D": 6.0}  # what a part has when nothing else is asked for
TINY_SECONDS = 300.0  # the limit of every section at tiny sizes


@dataclass(frozen=True)
class Section:
    """``module.function`` of this package. seconds: expected on an H100 (of some measured), limit: it is ended
    then. ``limit`` 0: whatever time is left."""

    name: str
    part: str
    module: str
    seconds: float
    limit: float
    what: str

    def load(self) -> Callable[[Any], None]:
        return getattr(importlib.import_module(f"bench.gpu.{self.module}"), self.name)


# The most important ones of a part first: what follows is left out when time is short.
SECTIONS = (
    Section("env", "A", "card", 6, 40, "the card, its software, its copy and product rates"),
    Section("correct", "A", "correct", 20, 60, "whole models: losses and gradients against the CPU"),
    Section("tests", "A", "checks", 110, 180, "pytest -m gpu in 14 processes"),
    Section("search", "A", "ops", 15, 60, "codebook_search beside its peers"),
    Section("vectors", "A", "ops", 18, 60, "the search on vectors as they are: features, cones, duplicates, NaN"),
    Section("quantizer", "A", "ops", 5, 45, "codebook_update and the quantizer's step beside their peers"),
    Section("head", "A", "head", 28, 90, "the masked-token head beside its peers"),
    Section("kernels", "A", "ops", 9, 40, "the time of every kernel of an op"),
    Section("sanitizer", "A", "checks", 45, 110, "compute-sanitizer: memcheck and racecheck over every kernel"),
    Section("norm", "A", "norm", 20, 60, "residual, layer scale, drop path and LayerNorm beside torch.compile"),
    Section("masks", "A", "ops", 5, 30, "block masks and masked_gather"),
    Section("scaling", "A", "ops", 15, 40, "the search as N, K and D grow"),
    Section("attention", "B", "attention", 32, 100, "attention with a learned bias, by each implementation"),
    Section("steps", "B", "models", 90, 150, "training steps beside the reference's structure"),
    Section("profile", "B", "models", 15, 45, "where the time of a step goes"),
    Section("forms", "B", "ops", 13, 40, "a step of every form of the quantizer, before and after replace_quantizers"),
    Section("files", "B", "trainings", 70, 110, "both trainings from image files, with the loaders that are there"),
    Section("compiled", "B", "models", 80, 130, "training steps under torch.compile"),
    Section("learn", "C", "learning", 90, 0, "does it learn: tokenizer, students, probes, fine-tuning"),
    Section("xformers", "D", "attention", 8, 40, "xformers is installed, and chosen"),
    Section("teacher", "D", "models", 12, 50, "CLIP's teacher of open_clip, random weights"),
    Section("dali", "D", "trainings", 50, 90, "loaders of pre-training views: pixels and images/s"),
    Section("deepspeed", "D", "trainings", 90, 140, "deepspeed train/pretrain.py under ZeRO 0 to 3"),
    Section("demo", "D", "trainings", 120, 200, "the demo, from photographs to its table"),
)
BY_NAME = {section.name: section for section in SECTIONS}


def chosen(names: Sequence[str], part: str | None, everything: bool) -> list[Section]:
    """Sections in the order of the plan.

    Raises:
        KeyError: an unknown section, named with those that there are.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise KeyError(f"unknown sections: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return [s for s in SECTIONS if everything or s.part == part or s.name in names]


def reason_to_skip(section: Section, left: float, tiny: bool) -> str | None:
    """Why a section does not fit in the seconds that are left; None if it does."""
    if tiny or section.seconds <= left:
        return None
    return f"no time: it is expected to take {section.seconds:.0f} s, {max(left, 0):.0f} s are left"


def limit_of(section: Section, left: float, tiny: bool) -> float:
    """Seconds after which a section is ended."""
    return min(left, TINY_SECONDS if tiny else section.limit or left)
