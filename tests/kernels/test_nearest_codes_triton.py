"""The k nearest codes by the GPU's kernel in Triton's interpreter: exact order, ties, what is not finite, bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..support.codebook_states import METRICS
from ..support.quantizers import noise
from ..support.search_oracle import PROBLEMS, exact_nearest
from ..support.triton_tools import guarded

host = pytest.importorskip(
    "beitv2_fast.kernels.codebook_search.triton", reason="triton is not installed", exc_type=ImportError
)

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "codes", "width", "k"), [(70, 200, 33, 5), (3, 19, 5, 17), (1, 1, 1, 1)])
def test_the_order_is_that_of_exact_arithmetic(n: int, codes: int, width: int, k: int, dtype, metric: str) -> None:
    x, codebook = noise(n, 2 * width).to(dtype)[:, ::2], noise(width, codes, seed=1).to(dtype).T
    assert torch.equal(host.nearest_codes_triton(x, codebook, metric, k), exact_nearest(x, codebook, metric, k))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["duplicated", "integers", "last bits", "huge", "subnormal"])
def test_ties_and_extreme_lengths_are_ordered(name: str, metric: str) -> None:
    x, codebook = PROBLEMS[name](torch.Generator().manual_seed(0))
    x, codebook = x[:8], codebook[:130]
    assert torch.equal(host.nearest_codes_triton(x, codebook, metric, 7), exact_nearest(x, codebook, metric, 7))


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_finite_comes_last_and_finds_the_first(metric: str) -> None:
    x, codebook = noise(6, 8), noise(12, 8, seed=1)
    x[0], x[2, 3], x[4, 1] = 0, torch.nan, torch.inf
    odd = torch.tensor([0, 5, 11])
    codebook[odd, odd % 8] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = host.nearest_codes_triton(x, codebook, metric, 12)
    assert (found[[2, 4]] == torch.arange(12)).all()
    whole = codebook.isfinite().all(-1).nonzero()[:, 0]
    expected = whole[exact_nearest(x[[0, 1, 3, 5]], codebook[whole], metric, 9)]
    assert torch.equal(found[[0, 1, 3, 5]], torch.cat([expected, odd.expand(4, 3)], 1))


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_outside_the_tensors_is_touched(metric: str, monkeypatch) -> None:
    x, codebook = guarded(noise(74, 5)), guarded(noise(2, 131, 5, seed=1))
    original = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **kw: guarded(original(*a, **kw)))
    found = host.nearest_codes_triton(x, codebook, metric, 3)
    monkeypatch.undo()
    for g in range(2):
        assert torch.equal(found[g::2], exact_nearest(x[g::2], codebook[g], metric, 3))
