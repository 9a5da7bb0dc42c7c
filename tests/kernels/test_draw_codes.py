"""draw_codes: the softmax's frequencies, and the same draws wherever a vector lies in memory, in a chunk, on a rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.kernels import codebook_search, draw_codes
from beitv2_fast.kernels.codebook_search import ops, reference
from beitv2_fast.kernels.counter_random import as_uniform, random_bits

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


PROBLEMS = {  # [N, D], [K, D], the rows' and the codes' scale
    "of many groups": (40, 3000, 32, 1, 1),
    "of a chunk and one code": (20, 8193, 4, 1, 1),
    "of one code": (9, 1, 3, 1, 1),
    "wide": (70, 300, 130, 1, 1),
    "short rows": (40, 100, 8, 1e-13, 1),
    "long rows": (40, 100, 8, 1e30, 1e-6),
    "small numbers": (40, 100, 8, 1e-30, 1e-32),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_instruction_set_draws_the_references_codes(name, metric):
    if not ops.native_ops():
        pytest.skip("the C++ ops are not compiled")
    n, k, d, of_rows, of_codes = PROBLEMS[name]
    x, codebook = noise(n, d) * of_rows, noise(k, d, seed=1) * of_codes
    x[3], x[5, 1] = 0, torch.inf
    codebook[k // 2 :: 37, 2] = torch.nan
    for temperature in (1e-30 * of_codes, 0.02 * of_codes, 0.5 * of_codes, torch.inf):
        expected = reference.draw_codes_reference(x, codebook, metric, temperature, torch.tensor(3), torch.arange(n))
        for capability in torch.ops.beitv2_fast_cpu.available_capabilities():
            torch.ops.beitv2_fast_cpu.use_capability(capability)
            drawn = draw_codes(x, codebook, metric=metric, temperature=temperature, seed=3)
            torch.ops.beitv2_fast_cpu.use_capability("")
            assert torch.equal(drawn, expected), (temperature, capability)


def test_vectors_far_from_zero_draw_by_their_differences(version):
    far = torch.tensor([1e9, 0.0]).repeat(20)
    x, codebook = (30 * noise(n, 40, seed=n) + far for n in (150, 100))
    apart = (x.double()[:, None] - codebook.double()).square().sum(-1).sqrt()
    keys = random_bits(torch.tensor(3), torch.arange(150))
    gumbel = -(-as_uniform(random_bits(keys[:, None], torch.arange(100))).log()).log()
    drawn = draw_codes(x, codebook, temperature=30.0, seed=3, metric="euclidean")
    assert torch.equal(drawn, (gumbel - apart / 30).argmax(-1)) and len(drawn.unique()) > 20


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("power", [664, 1000])
def test_float64_whose_squares_overflow_draws_as_near_1(metric, power):
    x, codebook, scale = noise(60, 8).double() * 1e5, noise(40, 8, seed=1).double() * 1e5, 2.0**power
    want = draw_codes(x, codebook, temperature=2e5, seed=3, metric=metric)
    drawn = draw_codes(x * scale, codebook * scale, temperature=2e5 * scale, seed=3, metric=metric)
    assert torch.equal(drawn, want) and len(want.unique()) > 10


@pytest.mark.parametrize("metric", METRICS)
def test_the_c_op_reads_16_bits_and_any_strides(metric):
    x, codebook = noise(30, 2, 60).bfloat16().permute(2, 0, 1)[:, :, 1], noise(9, 60, seed=1).half()[:, ::2]
    drawn = draw_codes(x, codebook, metric=metric, temperature=0.5, seed=3)
    assert torch.equal(
        drawn, reference.draw_codes_reference(x, codebook, metric, 0.5, torch.tensor(3), torch.arange(60))
    )
    assert draw_codes(x[:0], codebook, temperature=0.5, seed=3).shape == (0,)


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


class Draws(torch.nn.Module):
    def forward(self, x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return draw_codes(x, codebook, temperature=0.5, seed=3)


@pytest.mark.parametrize("codebooks", [(), (2,)])
def test_draws_are_exported_for_any_number_of_vectors(codebooks):
    codebook, n = noise(*codebooks, 9, 4, seed=1), torch.export.Dim("n")
    shapes = {"x": {0: 2 * n}, "codebook": None}
    program = torch.export.export(Draws(), (noise(6, 4), codebook), dynamic_shapes=shapes, strict=False).module()
    for count in (4, 6, 50):
        x = noise(count, 4, seed=count)
        assert torch.equal(program(x, codebook), draw_codes(x, codebook, temperature=0.5, seed=3))
