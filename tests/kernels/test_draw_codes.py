"""draw_codes: the softmax's frequencies, and the same draws wherever a vector lies in memory, in a chunk, on a rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.kernels import codebook_search, draw_codes
from beitv2_fast.kernels.codebook_search import reference

from ..support.codebook_states import METRICS
from ..support.quantizers import noise


def logits(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    if metric == "cosine":
        return F.normalize(x.double(), dim=-1) @ codebook.double().T
    return -torch.cdist(x.double(), codebook.double())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_codes_are_drawn_as_often_as_the_softmax_says(metric, temperature):
    x, codebook, count = noise(1, 5), noise(6, 5, seed=1), 20_000
    drawn = draw_codes(x.expand(count, 5), codebook, temperature=temperature, seed=0, metric=metric)
    p = (logits(x, codebook, metric)[0] / temperature).softmax(-1)
    frequencies = torch.bincount(drawn, minlength=6) / count
    assert ((frequencies - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize("metric", METRICS)
def test_near_0_they_are_the_nearest_codes(metric):
    x, codebook = noise(200, 8), noise(50, 8, seed=1)
    nearest = codebook_search(x, codebook, metric=metric).indices
    assert torch.equal(draw_codes(x, codebook, temperature=1e-9, seed=0, metric=metric), nearest)


def test_a_draw_depends_on_seed_and_place_and_on_no_chunk(monkeypatch):
    x, codebook = noise(300, 8), noise(50, 8, seed=1)
    torch.manual_seed(1)
    drawn = draw_codes(x, codebook, temperature=1.0, seed=3)
    torch.manual_seed(2)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 700)
    assert torch.equal(draw_codes(x, codebook, temperature=1.0, seed=3), drawn)
    assert torch.equal(draw_codes(x, codebook, temperature=1.0, seed=torch.tensor(3)), drawn)
    assert torch.equal(draw_codes(x[:100], codebook, temperature=1.0, seed=3), drawn[:100])
    assert (draw_codes(x, codebook, temperature=1.0, seed=4) != drawn).double().mean() > 0.5
    assert len(draw_codes(x[:1].expand(300, 8), codebook, temperature=1.0, seed=3).unique()) > 20


def test_vectors_and_codes_that_are_not_finite_draw_as_they_search():
    x, codebook = noise(100, 8), noise(20, 8, seed=1)
    x[3, 2], codebook[5, 0], codebook[7, 1] = torch.nan, torch.inf, torch.nan
    drawn = draw_codes(x, codebook, temperature=5.0, seed=0)
    assert drawn[3] == 0 and not {5, 7} & {*drawn.tolist()}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        draw_codes(noise(3, 4), noise(5, 4), temperature=0, seed=0)
    with pytest.raises(ValueError, match="same D"):
        draw_codes(noise(3, 4), noise(5, 3), temperature=1, seed=0)
