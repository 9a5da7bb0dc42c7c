"""Vectors and states that the tests of the quantizers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)  # not the codebook's
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def everything(module: nn.Module) -> dict[str, Tensor]:
    """Also the buffers that no state dict holds."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same bits under the same names."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
