"""What the quantizer does beyond the golden steps: k-means start, dead codes, usage."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast import FusedVectorQuantizer


def clusters(count: int, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, dim, generator=generator), dim=-1)
    return centres[torch.arange(count) % 4] + 0.01 * torch.randn(count, dim, generator=generator)


def test_the_first_batch_initialises_the_codebook_by_k_means():
    quantizer = FusedVectorQuantizer(4, 8).train()
    x = clusters(256)
    quantizer(x)
    assert bool(quantizer.initialized)
    similarity = (F.normalize(x, dim=-1) @ quantizer.codebook.T).amax(1)
    assert similarity.mean() > 0.7
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize(("dead_after", "expected"), [(2.0, True), (0.0, False)])
def test_idle_codes_restart_at_vectors_of_the_batch_only_when_asked(dead_after, expected):
    quantizer = FusedVectorQuantizer(32, 8, kmeans_init=False, dead_after=dead_after).train()
    start = quantizer.codebook.clone()
    x = clusters(128)
    chosen = quantizer.encode(x).unique()
    idle = [j for j in range(32) if j not in chosen]
    assert idle
    for _ in range(8):
        quantizer(x)
    moved = (quantizer.codebook - start)[idle].abs().amax() > 1e-3
    assert bool(moved) == expected


def test_the_codes_do_not_depend_on_how_the_batch_is_ordered():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    a, b = (FusedVectorQuantizer(16, 8, kmeans_init=False).train() for _ in range(2))
    a(x)
    b(x.flip(0))
    assert torch.equal(a.codebook, b.codebook)


def test_usage_counts_codes_since_the_last_reset():
    quantizer = FusedVectorQuantizer(4, 8, kmeans_init=False).eval()
    quantizer(quantizer.codebook[:2])
    assert quantizer.usage(reset=True) == pytest.approx({"used_codes": 0.5, "perplexity": 2.0})
    assert quantizer.usage()["used_codes"] == 0.0


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ValueError, match="width 8"):
        FusedVectorQuantizer(4, 8)(torch.zeros(3, 7))
