"""codebook_update's Triton kernels, interpreted: the bits of the reference, no access outside."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels.codebook_update.reference import apply_statistics_reference, codebook_statistics_reference

from ..support.codebook_states import METRICS, State, make_batch, make_state
from ..support.triton_tools import guarded, untouched

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

SHAPES = [(100, 9, 5), (65, 300, 32), (70, 1, 33), (3, 2, 1), (9, 6, 200), (0, 4, 8)]  # N, K, D
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def statistics(*arguments) -> torch.Tensor:
    from beitv2_fast.kernels.codebook_update.triton import codebook_statistics_triton

    return codebook_statistics_triton(*arguments)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "num_codes", "dim"), SHAPES)
def test_statistics_have_the_bits_of_the_reference(count, num_codes, dim, dtype, metric):
    x, indices = make_batch(count, num_codes, dim)
    x = x.to(dtype)
    x[::11] = 0
    x[5::13, :1] = torch.nan
    x[7::17, -1:] = -torch.inf
    indices[3::19] = -1
    actual = statistics(guarded(x), guarded(indices), num_codes, metric)
    assert torch.equal(actual, codebook_statistics_reference(x, indices, num_codes, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-12, 1e-6, 3e8, 1e38])
def test_vectors_of_any_magnitude_have_the_bits_of_the_reference(metric, scale):
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(3)) * scale
    x[1, 5:] = 0
    indices = torch.arange(40) % 3
    assert torch.equal(statistics(x, indices, 3, metric), codebook_statistics_reference(x, indices, 3, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_strided_vectors_have_the_bits_of_the_reference(metric):
    x, indices = make_batch(60, 9, 24)
    for rows, codes in ((x[::2], indices[::2]), (x.T.contiguous().T, indices), (x[:1].expand(60, -1), indices)):
        assert torch.equal(statistics(rows, codes, 9, metric), codebook_statistics_reference(rows, codes, 9, metric))


def test_a_column_may_lie_beyond_32_bits():
    x, indices = make_batch(9, 4, 3)
    rows = untouched(2**31 + 9, torch.float16).as_strided((9, 3), (1, 2**30)).copy_(x)
    near = rows.contiguous()
    expected = codebook_statistics_reference(near, indices, 4, "cosine")
    assert torch.equal(statistics(rows, indices, 4, "cosine"), expected)


@pytest.mark.parametrize("shape", [(1,), (1500,), (3, 70)])
def test_uses_are_counted_as_by_plain_torch(shape):
    from beitv2_fast.kernels.codebook_update.ops import count_uses
    from beitv2_fast.kernels.codebook_update.triton import count_uses_triton

    bins, idle, window = torch.randint(3, (3, *shape), generator=torch.Generator().manual_seed(0))
    for given in ((idle, window, torch.tensor(4)), (idle, None, None)):
        ours, theirs = ([t if t is None else t.clone() for t in given] for _ in range(2))
        count_uses_triton(guarded(bins), *ours)
        count_uses(bins, *theirs)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(theirs[0], torch.where(bins > 0, 0, idle + bins.sum(-1, keepdim=True)))


def test_one_popular_code_has_the_bits_of_the_reference():
    x, indices = make_batch(300, 9, 8)
    indices = torch.where(torch.arange(300) % 10 > 0, 7, indices)
    assert torch.equal(statistics(x, indices, 9, "cosine"), codebook_statistics_reference(x, indices, 9, "cosine"))


def test_vectors_outside_the_codebook_are_not_counted():
    x, indices = make_batch(50, 4, 8)
    indices[7], indices[9] = 4, -2
    keep = (indices >= 0) & (indices < 4)
    expected = codebook_statistics_reference(x[keep], indices[keep], 4, "cosine")
    assert torch.equal(statistics(x, indices, 4, "cosine"), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("num_codes", "dim"), [(70, 32), (1, 5), (300, 3)])
def test_the_second_pass_has_the_bits_of_the_reference(num_codes, dim, metric, average):
    from beitv2_fast.kernels.codebook_update.triton import apply_statistics_triton

    x, indices = make_batch(100, num_codes, dim)
    expected = make_state(num_codes, dim, average=average or metric == "euclidean")
    expected.codebook[0, 0] = torch.inf
    sums = codebook_statistics_reference(x, indices, num_codes, metric)
    actual = State(
        *(None if t is None else guarded(t) for t in (expected.codebook, expected.cluster_size, expected.embed_avg)),
        expected.idle,
    )
    options = (0.97, metric, 1e-5)
    bins = [
        apply(sums, state.codebook, state.cluster_size, state.embed_avg, *options)
        for apply, state in ((apply_statistics_triton, actual), (apply_statistics_reference, expected))
    ]
    assert torch.equal(*bins)
    for state in (actual, expected):
        state.codebook.nan_to_num_(123)
    assert actual.same_bits(expected)


@pytest.mark.parametrize("average", [False, True])
def test_codebooks_in_turn_learn_with_the_bits_of_each_alone(average):
    from beitv2_fast.kernels.codebook_update.triton import apply_statistics_triton

    x, indices = make_batch(99, 300, 8)
    indices[3::19] = -1
    states = [make_state(300, 8, average=average, seed=g) for g in range(3)]
    together = [torch.stack([s.codebook for s in states]), torch.stack([s.cluster_size for s in states])]
    together += [torch.stack([s.embed_avg for s in states]) if average else None]
    sums = statistics(x, indices, 300, "cosine", 3)
    bins = apply_statistics_triton(sums, *together, 0.97, "cosine", 1e-5)
    for g, state in enumerate(states):
        alone = codebook_statistics_reference(x[g::3], indices[g::3], 300, "cosine")
        of_state = (state.codebook, state.cluster_size, state.embed_avg)
        expected = apply_statistics_reference(alone, *of_state, 0.97, "cosine", 1e-5)
        assert torch.equal(sums.view(3, 300, -1)[g], alone) and torch.equal(bins.view(3, 300)[g], expected)
        assert all(a is b is None or torch.equal(a[g], b) for a, b in zip(together, of_state, strict=True))
