"""codebook_search with k: the k nearest codes in their exact order, ties by index."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.kernels import codebook_search
from beitv2_fast.kernels.codebook_search import reference

from ..support.codebook_states import METRICS
from ..support.quantizers import noise
from ..support.search_oracle import PROBLEMS, exact_nearest


def expected(x: torch.Tensor, codebook: torch.Tensor, metric: str, k: int) -> torch.Tensor:
    """A stable sort of float64 scores, whose sums are all in one order."""
    products = (x.double()[:, None] * codebook.double()).sum(-1)
    scores = products if metric == "cosine" else products - codebook.double().square().sum(-1) / 2
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_nearest_codes_come_in_order_whatever_the_chunk(metric, k, dtype, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_SCORES", 37 * 11)
    x, codebook = noise(50, 8).to(dtype), noise(37, 8, seed=1).to(dtype)
    found = codebook_search(x, codebook, metric=metric, k=k, return_distances=True, return_codes=True)
    assert torch.equal(found.indices, expected(x, codebook, metric, k))
    assert torch.equal(found.codes, codebook[found.indices]) and found.normalized is None
    y = F.normalize(x.double(), dim=-1) if metric == "cosine" else x.double()
    apart = (y[:, None] - codebook.double()[found.indices]).square().sum(-1)
    torch.testing.assert_close(found.distances, apart.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.indices[:, 0], codebook_search(x, codebook, metric=metric).indices)


@functools.cache
def problem(name: str, metric: str, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, codebook = (t[:700] for t in PROBLEMS[name](torch.Generator().manual_seed(3)))
    x = x[:25]
    return x, codebook, exact_nearest(x, codebook, metric, min(k, len(codebook)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [2, 7])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_order_is_the_one_of_exact_arithmetic(version, name, metric, k):
    if version == "reference" and name == "beyond double":
        pytest.skip("the definition is float64; the C++ op goes further")
    x, codebook, order = problem(name, metric, k)
    for rows in (len(x), 5):
        found = codebook_search(x[:rows], codebook, metric=metric, k=order.shape[1]).indices
        assert torch.equal(found, order[:rows])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("codes", "width", "k"), [(1, 1, 1), (33, 5, 33), (70, 3, 64), (700, 16, 20), (9000, 33, 4)])
def test_any_number_of_any_number_of_codes(version, codes, width, k, metric, dtype):
    x, codebook = noise(45, 2 * width).to(dtype)[:, ::2], noise(width, codes, seed=1).to(dtype).T
    order = exact_nearest(x, codebook, metric, k)
    for rows in (45, 5):
        assert torch.equal(codebook_search(x[:rows], codebook, metric=metric, k=k).indices, order[:rows])


@pytest.mark.parametrize("metric", METRICS)
def test_a_collapsed_codebook_and_copies_of_the_nearest_come_by_their_index(version, metric):
    one = noise(1, 12, seed=1)
    found = codebook_search(noise(20, 12), one.expand(300, 12), metric=metric, k=50).indices
    assert torch.equal(found, torch.arange(50).expand(20, 50))
    codebook = torch.cat([one, 0.1 * noise(98, 12), one])  # the last code is packed more than once
    order = codebook_search(one, codebook, metric=metric, k=5).indices
    assert order[0, :2].tolist() == [0, 99] and torch.equal(order, exact_nearest(one, codebook, metric, 5))


@pytest.mark.parametrize("metric", METRICS)
def test_equally_near_codes_come_by_their_index(version, metric):
    codebook = F.normalize(noise(5, 8), dim=-1)[torch.tensor([3, 1, 3, 0, 1, 3, 2, 3, 4])]
    x = codebook[:1] * torch.tensor([[1.0], [2.0]])
    for k in (1, 2, 3, 4, 9):
        indices = codebook_search(x, codebook, metric=metric, k=k).indices
        assert torch.equal(indices, expected(x, codebook, metric, k))
        assert indices[0, :4].tolist() == [0, 2, 5, 7][:k]


def test_equal_codes_of_a_transposed_float64_codebook_come_by_their_index():
    copies = torch.randint(33, (300,), generator=torch.Generator().manual_seed(0))
    base = torch.randn(33, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, codebook = base[copies[:40]] + 0.01 * noise(40, 64, seed=1), base[copies].T.contiguous().T
    first = [(copies == copy).nonzero()[0].item() for copy in copies[:40]]
    for k in (None, 2):
        indices = codebook_search(x, codebook, metric="euclidean", k=k).indices
        assert indices.view(40, -1)[:, 0].tolist() == first


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_finite_comes_last_and_finds_the_first(version, metric):
    x, codebook = noise(6, 8), noise(5, 8, seed=1)
    x[2, 3], codebook[1, 0], codebook[3, 2] = torch.nan, torch.inf, torch.nan
    found = codebook_search(x, codebook, metric=metric, k=5, return_distances=True)
    assert found.indices[2].tolist() == [0, 1, 2, 3, 4] and found.distances[2].isnan().all()
    rest = found.indices[[0, 1, 3, 4, 5]]
    assert (rest[:, 3:] == torch.tensor([1, 3])).all() and (rest.sort().values == torch.arange(5)).all()
    nothing = codebook_search(torch.zeros(1, 8), codebook, k=4).indices
    assert nothing.tolist() == [[0, 2, 4, 1]]
    assert codebook_search(x, codebook * torch.nan, metric=metric, k=3).indices.unique(dim=0).tolist() == [[0, 1, 2]]
    assert codebook_search(x[2:3], codebook, metric=metric, k=3).indices.tolist() == [[0, 1, 2]]


def test_no_vectors_and_impossible_k(version):
    assert codebook_search(noise(0, 8), noise(5, 8), k=3).indices.shape == (0, 3)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"between 1 and the 5 codes there are; got {k}"):
            codebook_search(noise(3, 8), noise(5, 8), k=k)
