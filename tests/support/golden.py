"""Reading ../shared/golden, and the tolerance of agreement with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from beitv2_fast.weights import from_published

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/golden (reference tensors) is not here")


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    return load_file(path), config


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
        assert_close(ours[name], gradient)
