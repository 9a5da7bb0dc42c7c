"""draw_codes' GPU kernel in Triton's interpreter: the reference's codes."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels.codebook_search.reference import draw_codes_reference
from beitv2_fast.kernels.counter_random import random_bits

from ..support.codebook_states import METRICS
from ..support.quantizers import noise
from ..support.triton_tools import guarded

host = pytest.importorskip(
    "beitv2_fast.kernels.codebook_search.triton", reason="triton is not installed", exc_type=ImportError
)

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1e-30, 0.1, 0.7, float("inf")])
def test_its_codes_are_the_references(metric, temperature):
    x, codebook = noise(150, 40), noise(100, 40, seed=1)
    x[3, 2], x[5], codebook[7, 1], codebook[90, 0] = torch.nan, 0, torch.inf, torch.nan
    key, numbers = torch.tensor(5), torch.arange(150) + 7
    drawn = host.draw_codes_triton(guarded(x), guarded(codebook), metric, temperature, random_bits(key, numbers))
    assert torch.equal(drawn, draw_codes_reference(x, codebook, metric, temperature, key, numbers))


@pytest.mark.parametrize("metric", METRICS)
def test_codebooks_in_turn_give_the_draws_of_each_alone(metric):
    x, codebook, keys = noise(99, 5), noise(3, 70, 5, seed=1), random_bits(torch.tensor(5), torch.arange(99))
    drawn = host.draw_codes_triton(guarded(x), guarded(codebook), metric, 0.5, keys)
    for g in range(3):
        alone = host.draw_codes_triton(x[g::3], codebook[g], metric, 0.5, keys[g::3].contiguous())
        assert torch.equal(drawn[g::3], alone)


def test_vectors_far_from_zero_draw_by_their_differences():
    far = torch.tensor([1e9, 0.0]).repeat(20)
    x, codebook = (30 * noise(n, 40, seed=n) + far for n in (70, 100))
    key, numbers = torch.tensor(5), torch.arange(70)
    drawn = host.draw_codes_triton(guarded(x), guarded(codebook), "euclidean", 30.0, random_bits(key, numbers))
    assert torch.equal(drawn, draw_codes_reference(x, codebook, "euclidean", 30.0, key, numbers))


def test_vectors_may_be_strided_of_16_bits_or_missing():
    x, codebook, key, numbers = noise(8, 60).half(), noise(9, 16).bfloat16()[:, ::2], torch.tensor(5), torch.arange(60)
    drawn = host.draw_codes_triton(x.T, codebook, "cosine", 0.5, random_bits(key, numbers))
    assert torch.equal(drawn, draw_codes_reference(x.T, codebook, "cosine", 0.5, key, numbers))
    assert host.draw_codes_triton(x.T[:0], codebook, "cosine", 0.5, numbers[:0]).shape == (0,)
