"""Vectors and codebooks as a search meets them: Gaussian ones, features of a ViT, and the cases that are hard.

The screening of codebook_search decides most rows by themselves; what it cannot decide is scored again, row by row.
Gaussian vectors are the easy case, so the others stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast.config.presets import TOKENIZER
from beitv2_fast.kernels import codebook_search
from beitv2_fast.quantize.kmeans import kmeans
from beitv2_fast.weights.build import build_tokenizer
from bench.harness import DEVICE

CONES = (0.1, 0.05, 0.03, 0.01)  # radians, about
TRAINING_STEPS, TARGET_DIM = 60, 64
Case = tuple[str, Tensor, Tensor]  # name, vectors [N, D], codebook [K, D]


def gaussian(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, device=DEVICE), F.normalize(torch.randn(k, d, device=DEVICE), dim=-1)


def made_up(n: int, k: int, d: int) -> Iterator[Case]:
    """The cases that need no network."""
    x, codes = gaussian(n, k, d)
    yield "Gaussian", x, codes
    few = codes[: max(k // 4, 1)]
    repeated = few.repeat(-(-k // len(few)), 1)[:k]
    yield "each code 4 times", x, repeated
    yield "each code 4 times, 1e-6 apart", x, F.normalize(repeated + 1e-6 * torch.randn_like(repeated), dim=-1)
    axis = F.normalize(torch.randn(1, d, device=DEVICE), dim=-1)
    for angle in CONES:
        inside, centers = (
            F.normalize(axis + angle * torch.randn(m, d, device=DEVICE) / d**0.5, dim=-1) for m in (n, k)
        )
        yield f"a cone of {angle}", inside, centers
    broken = codes.clone()
    broken[min(5, k - 1), 0] = float("nan")
    yield "one NaN code", x, broken
    yield "a collapsed codebook", x, codes[:1].expand(k, d).contiguous()


def images(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random pictures [count, 3, size, size] in 0..1: patches of one picture resemble each other."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator, device=DEVICE)
    texture = torch.rand(count, 3, size // 4, size // 4, generator=generator, device=DEVICE)
    both = [F.interpolate(x, (size, size), mode="bicubic", antialias=True) for x in (coarse, texture)]
    return (0.75 * both[0] + 0.25 * both[1]).clamp(0, 1)


def of_a_tokenizer(n: int, k: int, tiny: bool) -> Iterator[Case]:
    """The vectors that a tokenizer's quantizer sees, before and after a short training, with their codes."""
    small = {"dim": 48, "depth": 2, "heads": 3, "image_size": 64} if tiny else {}
    config = replace(TOKENIZER["base"], num_codes=k, decoder_depth=1, **small)
    torch.manual_seed(0)
    model = build_tokenizer(config, TARGET_DIM).to(DEVICE)
    patches = model.grid[0] * model.grid[1]
    batch = -(-n // patches)
    sample = images(batch, config.image_size)
    x = _features(model, sample)[:n]
    yield "features of an untrained ViT, k-means codes", x, kmeans(x, k)[0]
    _train(model.train(), 4 if tiny else TRAINING_STEPS, 4 if tiny else 64)
    yield "features of a trained tokenizer, its codes", _features(model, sample)[:n], model.quantize.codebook.clone()


@torch.no_grad()
def _features(model: nn.Module, sample: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        parts = [model.eval().features(part).flatten(0, 1).float() for part in sample.split(64)]
    return torch.cat(parts)


def _train(model: nn.Module, steps: int, batch: int) -> None:
    """Towards a fixed random projection of the patches' pixels: enough that codes and features find each other."""
    side = model.config.encoder.patch_size
    projection = torch.randn(3 * side * side, TARGET_DIM, device=DEVICE) / side
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for step in range(steps):
        sample = images(batch, model.config.encoder.image_size, seed=1 + step)
        target = torch.tanh(F.unfold(sample - 0.5, side, stride=side).transpose(1, 2) @ projection)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(sample, target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def not_nearest(x: Tensor, codebook: Tensor) -> int:
    """How many rows' index is not that of a nearest code, by cosine in float64; rows and codes that are not finite are
    left out."""
    found = codebook_search(x, codebook).indices
    valid = codebook.isfinite().all(1)
    codes = torch.where(valid[:, None], codebook, 0).double()
    wrong = 0
    for rows, indices in zip(x.split(2048), found.split(2048), strict=True):
        scores = F.normalize(rows.double(), dim=-1) @ codes.T
        scores[:, ~valid] = -float("inf")
        got = scores.gather(1, indices[:, None])[:, 0]
        wrong += int(((got < scores.amax(1) - 1e-13) & rows.isfinite().all(1)).sum())
    return wrong
