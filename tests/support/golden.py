"""Reading the reference's tensors, small ones in tests/golden and larger ones in ../shared/golden, and the tolerance of
agreement with them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from beitv2_fast.weights import from_published

SMALL = Path(__file__).resolve().parents[1] / "golden"
LARGE = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_large = pytest.mark.skipif(not LARGE.is_dir(), reason="../shared/golden (all reference tensors) is not here")
STRIDE = 13  # of a large gradient the small files have every 13th value, which meets all rows and columns


def load(name: str, folder: Path = SMALL) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file, and the config in its metadata."""
    path = folder / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    draws = json.loads(metadata.get("drawn", "{}"))
    tensors = {key: drawn(int(metadata["seed"]), *draw) for key, draw in draws.items()}
    return load_file(path) | tensors, json.loads(metadata.get("config", "{}"))


def drawn(seed: int, kind: str, offset: int, shape: list[int], layer: int) -> torch.Tensor:
    """A tensor as the reference's initialization drew it: ``offset`` numbers after the seed, divided by sqrt(2 layer)
    for the output projections of the layer-th block."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(offset, generator=generator)
    if kind in ("rand", "randn"):
        return getattr(torch, kind)(shape, generator=generator)
    weight = torch.empty(shape)
    if kind == "kaiming_uniform":
        torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    else:  # by the inverse of the distribution function, as trunc_normal_ of the reference's torch
        std, cut = 0.02, 0.02 if kind == "trunc_normal cut at 0.02" else 2.0
        share = math.erf(cut / std / 2**0.5)
        weight.uniform_(-share, share, generator=generator).erfinv_().mul_(std * 2**0.5).clamp_(-cut, cut)
    return weight.div_((2.0 * layer) ** 0.5) if layer else weight


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_parameters(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(from_published(under(tensors, "param.")))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-5 relative to the largest value of the tensor, in float32: sums of either sign lose digits elementwise."""
    ours = ours.detach().reshape(theirs.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def assert_gradients_close(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    golden = from_published(under(tensors, "grad."))
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == golden.keys()
    for name, gradient in golden.items():
        assert_close(ours[name] if gradient.numel() == ours[name].numel() else sampled(ours[name]), gradient)


def sampled(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.flatten()[::STRIDE]
