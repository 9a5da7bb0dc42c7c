"""Vectors and states that the tests of the quantizers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beitv2_fast import FusedVectorQuantizer, ResidualVectorQuantizer


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)  # not the codebook's
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def narrow(step: int, shape: tuple[int, ...] = (3, 20, 8)) -> Tensor:
    """Vectors near one axis, another one in the next step: codes die and restart."""
    return noise(*shape, seed=step) * torch.eye(8)[step % 2] + 0.1 * noise(*shape, seed=step + 50)


def quantizer(**options: object) -> FusedVectorQuantizer | ResidualVectorQuantizer:
    """Of 16 codes of width 8, in training mode."""
    kind = ResidualVectorQuantizer if "num_quantizers" in options else FusedVectorQuantizer
    return kind(16, 8, **options).train()


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
