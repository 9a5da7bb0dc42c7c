"""Quantizers in regions of activation checkpointing: the second forward neither learns nor finds other codes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from beitv2_fast.kernels.snapshot import MOST

from ..support.quantizers import noise, quantizer

CASES = {
    "code_ema": {"dead_after": 1.0},
    "sum_ema": {"metric": "euclidean", "decay": 0.5, "dead_after": 1.0},
    "gradient": {"learning": "gradient", "dead_after": 1.0},
    "heads": {"heads": 2, "gradient": "rotation", "restart_below": 0.9, "restart_after": 3},
    "residual": {"num_quantizers": 3, "share_stages": True},
}


class Region(torch.nn.Module):
    """An encoder, a quantizer and a decoder; returns a loss."""

    def __init__(self, **options: object):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.quantizer = quantizer(**options)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        out = self.quantizer(self.encoder(x), mask)
        return self.decoder(out.quantized).square().mean() + out.loss + 1e-3 * out.counts.square().sum()


def train(region: Region, reentrant: bool | None, masked: bool, forwards: int = 2) -> list[torch.Tensor]:
    """Ten steps of several forwards before each backward; all losses and gradients, and the state at the end."""
    seen = []
    mask = torch.arange(20).expand(3, 20) < 15 if masked else None
    for step in range(10):
        losses = []
        for i in range(forwards):
            x = noise(3, 20, 8, seed=step + 100 * i) * torch.eye(8)[step % 2] + 0.1 * noise(3, 20, 8, seed=50 + step)
            run = region if reentrant is None else lambda *a: checkpoint(region, *a, use_reentrant=reentrant)
            losses.append(run(x.requires_grad_(), mask))
        sum(losses).backward()
        seen += [loss.detach() for loss in losses] + [p.grad for p in region.parameters()]
        with torch.no_grad():
            for p in region.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    return seen + list(region.state_dict().values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_trains_to_the_bits_of_a_plain_one(reentrant, name, masked):
    plain, checkpointed = Region(**CASES[name]), Region(**CASES[name])
    expected, got = train(plain, None, masked), train(checkpointed, reentrant, masked)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert plain.quantizer.usage() == checkpointed.quantizer.usage()


@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints_train_to_the_bits_of_a_plain_region(reentrant):
    class Nested(Region):
        def forward(self, x, mask=None):
            return checkpoint(super().forward, x, mask, use_reentrant=reentrant)

    assert all(
        torch.equal(a, b) for a, b in zip(train(Region(), None, False), train(Nested(), reentrant, False), strict=True)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_in_eval_mode_counts_no_usage(reentrant):
    region = Region(kmeans_init=False).eval()
    x = noise(3, 20, 8).requires_grad_()
    checkpoint(region, x, use_reentrant=reentrant).backward()
    once = Region(kmeans_init=False).eval()
    once(x)
    assert torch.equal(region.quantizer.window_counts, once.quantizer.window_counts)
    assert torch.equal(region.quantizer.cluster_size, once.quantizer.cluster_size)


@pytest.mark.parametrize("reentrant", [True, False])
def test_codebooks_of_forwards_are_kept_only_until_they_were_recomputed(reentrant):
    region = Region()
    train(region, reentrant, False, forwards=3)
    checkpoint(region, noise(3, 20, 8).requires_grad_(), use_reentrant=reentrant)
    assert len(region.quantizer.snapshots.kept) == 1
    plain = Region()
    train(plain, None, False)
    with torch.no_grad():
        plain(noise(3, 20, 8))
    assert plain.quantizer.snapshots.kept == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
def test_forwards_of_the_same_vectors_each_find_their_own_codes(reentrant, dropped):
    gradients = []
    for checkpointed in (False, True):
        layer, x = quantizer(gradient="rotation", kmeans_init=False, decay=0.3), noise(60, 8).requires_grad_()
        run = (lambda f, x: checkpoint(f, x, use_reentrant=reentrant)) if checkpointed else (lambda f, x: f(x))
        first, second = (run(lambda x, layer=layer: layer(x).quantized, x) for _ in range(2))
        assert not torch.equal(first, second)
        weights = noise(60, 8, seed=1)
        ((second if dropped else first + 2 * second) * weights).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_more_forwards_than_are_kept_before_a_backward_are_refused():
    region = Region()
    losses = [
        checkpoint(region, noise(3, 20, 8, seed=i).requires_grad_(), use_reentrant=False) for i in range(MOST + 1)
    ]
    losses[-1].backward()
    with pytest.raises(RuntimeError, match=f"more than {MOST} forwards"):
        losses[0].backward()
