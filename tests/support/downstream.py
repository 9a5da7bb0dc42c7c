"""What the tests of probes, fine-tuning and segmentation share: pictures that are easy to learn, and options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .training import TINY

COLORS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}
SMALL = [*TINY, "--channels", 16, "--auxiliary-channels", 8, "--ignore-labels", 7, "--base-size", 40, "--overlays", 2]
EVALUATE = ["--crop-pct", 1.0, "--precision", "fp32", "--workers", 0, "--device", "cpu"]


def write_colors(folder: Path, count: int, names=tuple(COLORS)) -> Path:
    """Noisy images of one color a class."""
    generator = torch.Generator().manual_seed(count)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = torch.randint(-20, 21, (40, 40, 3), generator=generator)
            pixels = (torch.tensor(COLORS[name]) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


def write_scenes(folder: Path, count: int, seed: int = 0) -> Path:
    """Noisy images 48x40 of three rectangles of one color a class, a border of void (7)."""
    draw, colors = np.random.default_rng(seed), np.array(list(COLORS.values()))
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        labels = np.full((40, 48), draw.integers(3), np.uint8)
        labels[: draw.integers(10, 30), : draw.integers(10, 40)] = draw.integers(3)
        labels[draw.integers(10, 30) :, draw.integers(10, 40) :] = draw.integers(3)
        pixels = (colors[labels] + draw.integers(-20, 21, (40, 48, 3))).clip(0, 255).astype(np.uint8)
        labels[:, :1] = 7
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{i}.png")
    return folder


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())
