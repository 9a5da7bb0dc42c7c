"""codebook_update: what it computes, and that its bits depend on nothing but the set of vectors and their codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.kernels import codebook_update
from beitv2_fast.kernels.codebook_update import ops
from beitv2_fast.kernels.codebook_update.dead_codes import restart_dead_codes
from beitv2_fast.kernels.codebook_update.ops import codebook_statistics
from beitv2_fast.kernels.codebook_update.reference import unpack_statistics
from beitv2_fast.kernels.native import native_ops

from ..support.codebook_states import METRICS, make_batch, make_state, update
from ..support.counting import allocations

needs_native = pytest.mark.skipif(not native_ops(), reason="the C++ ops are not compiled")


def test_norm_ema_equals_the_one_hot_form():
    x, indices = make_batch(500, 20, 16)
    state, before = make_state(20, 16), make_state(20, 16)
    bins = update(state, x, indices, decay=0.9)
    one_hot, y = F.one_hot(indices, 20).double(), F.normalize(x.double(), dim=-1)
    counts = one_hot.sum(0)
    mean = F.normalize(one_hot.T @ y / counts.clamp(min=1)[:, None], dim=-1)
    mean = torch.where((counts > 0)[:, None], mean, before.codebook.double())
    expected = F.normalize(0.9 * before.codebook.double() + 0.1 * mean, dim=-1)
    assert torch.equal(bins, counts.long())
    assert counts[-1] == 0  # an unused code is part of the test
    torch.testing.assert_close(state.codebook, expected.float(), rtol=0, atol=3e-7)
    torch.testing.assert_close(state.cluster_size, (0.9 * before.cluster_size + 0.1 * counts).float())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_moving_averages_equal_the_one_hot_form_with_smoothed_sizes(metric, eps):
    x, indices = make_batch(500, 20, 16)
    state, before = make_state(20, 16, average=True), make_state(20, 16, average=True)
    update(state, x, indices, decay=0.9, metric=metric, eps=eps)
    one_hot, y = F.one_hot(indices, 20).double(), x.double()
    y = F.normalize(y, dim=-1) if metric == "cosine" else y
    size = 0.9 * before.cluster_size.double() + 0.1 * one_hot.sum(0)
    average = 0.9 * before.embed_avg.double() + 0.1 * one_hot.T @ y
    codes = average / ((size + eps) / (size.sum() + 20 * eps) * size.sum())[:, None]
    codes = F.normalize(codes, dim=-1) if metric == "cosine" else codes
    tolerance = dict(rtol=1e-6, atol=1e-6 * codes.abs().max().item())
    torch.testing.assert_close(state.cluster_size, size.float())
    torch.testing.assert_close(state.embed_avg, average.float(), rtol=1e-6, atol=1e-6 * average.abs().max().item())
    torch.testing.assert_close(state.codebook, codes.float(), **tolerance)


def test_without_smoothing_a_code_of_size_zero_stays():
    state = make_state(4, 8, average=True)
    state.cluster_size.zero_()
    before = state.clone()
    update(state, torch.ones(3, 8), torch.zeros(3, dtype=torch.int64), metric="euclidean", eps=0.0)
    assert torch.equal(state.codebook[1:], before.codebook[1:])
    assert state.codebook.isfinite().all()


def test_with_decay_zero_codes_become_the_means_of_their_vectors():
    x, indices = make_batch(300, 5, 7)
    state = make_state(5, 7, average=True)
    update(state, x, indices, decay=0.0, metric="euclidean", eps=0.0)
    mean = torch.stack([x[indices == j].double().mean(0) for j in range(4)])
    torch.testing.assert_close(state.codebook[:4].double(), mean, rtol=1e-6, atol=1e-6 * mean.abs().max().item())


def test_sums_of_200000_vectors_are_exact_to_fp32():
    x, indices = make_batch(200_000, 1, 4)
    _, sums = unpack_statistics(codebook_statistics(x, indices, 1, "euclidean"), "euclidean")
    torch.testing.assert_close(sums[0], x.double().sum(0), rtol=1e-9, atol=1e-6)
    _, sums = unpack_statistics(codebook_statistics(x, indices, 1, "cosine"), "cosine")
    torch.testing.assert_close(sums[0], F.normalize(x.double(), dim=-1).sum(0), rtol=1e-7, atol=1e-4)


def test_as_many_vectors_as_promised_do_not_overflow_a_sum():
    statistics = codebook_statistics(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), 1, "cosine")
    assert 2**27 * int(statistics[0, 1]) <= 2**63
    largest = torch.full((1, 1), 2.0**32 - 256)
    statistics = codebook_statistics(largest, torch.zeros(1, dtype=torch.int64), 1, "euclidean")
    assert int(statistics[0, 0]) == 1
    assert 2**27 * int(statistics[0, 1:].abs().max()) <= 2**63


# Dead codes


def test_dead_codes_restart_at_distinct_vectors_of_the_batch_with_all_their_state():
    x, _ = make_batch(100, 1, 6)
    indices = torch.arange(100) % 4
    state = make_state(20, 6, average=True)
    state.idle.zero_()
    for step in range(3):
        update(state, x, indices, metric="euclidean", dead_after=250, restart_seed=step if step == 2 else None)
    dead = torch.arange(20) >= 4
    rows = state.codebook[dead]
    matches = (rows[:, None] == x[None]).all(-1)
    assert (matches.sum(1) >= 1).all()
    assert len(matches.nonzero()[:, 1].unique()) == 16
    sizes = state.cluster_size[dead]
    assert (sizes == sizes[0]).all()
    assert sizes[0] > 0
    torch.testing.assert_close(state.embed_avg[dead], rows * sizes[:, None])
    assert (state.idle == 0).all()


def test_codes_below_the_size_restart_once_and_others_stay():
    x, _ = make_batch(64, 1, 6)
    indices = torch.arange(64) % 2
    state, plain = make_state(8, 6), make_state(8, 6)
    for one in (state, plain):
        one.cluster_size[:] = torch.tensor([5.0, 5, 5, 5, 0.1, 0.1, 0.1, 0.1])
    update(state, x, indices, dead_below=1.0, restart_seed=0)
    update(plain, x, indices)
    assert torch.equal(state.codebook[:4], plain.codebook[:4])
    assert not torch.equal(state.codebook[4:], plain.codebook[4:])
    torch.testing.assert_close(state.codebook.norm(dim=-1), torch.ones(8))
    assert (state.cluster_size >= 1).all()


def test_a_batch_without_usable_vectors_restarts_nothing():
    for x in (torch.zeros(0, 6), torch.full((3, 6), torch.nan), torch.zeros(3, 6)):
        state, plain = make_state(8, 6), make_state(8, 6)
        update(state, x, torch.zeros(len(x), dtype=torch.int64), dead_below=100.0, restart_seed=0)
        update(plain, x, torch.zeros(len(x), dtype=torch.int64))
        assert state.same_bits(plain)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_a_use_are_never_what_a_code_restarts_at(metric):
    x, _ = make_batch(12, 1, 6)
    x[::3] = torch.nan
    x[1::3] = 0 if metric == "cosine" else torch.inf
    state = make_state(8, 6, average=True)
    codebook = state.codebook.clone()
    dead = torch.arange(8) != 2
    restarted = restart_dead_codes(
        dead, x, state.codebook, state.cluster_size, state.embed_avg, state.idle, metric=metric, salt=1
    )
    assert restarted.tolist() == [True, True, False, True, True, False, False, False]  # 4 vectors for 7 dead codes
    assert torch.equal(state.codebook[~restarted], codebook[~restarted])
    usable = F.normalize(x[2::3], dim=-1) if metric == "cosine" else x[2::3]
    distances = torch.cdist(state.codebook[restarted], usable)
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3] and distances.amin(1).max() < 1e-3


# Edges


def test_an_empty_batch_only_decays():
    state, before = make_state(5, 4), make_state(5, 4)
    bins = update(state, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), decay=0.5)
    assert bins.sum() == 0
    torch.testing.assert_close(state.codebook, before.codebook)
    torch.testing.assert_close(state.cluster_size, 0.5 * before.cluster_size)


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_that_are_not_finite_and_padding_do_not_count(metric):
    x, indices = make_batch(50, 6, 5)
    state, expected = (make_state(6, 5, average=metric == "euclidean") for _ in range(2))
    keep = torch.ones(50, dtype=torch.bool)
    keep[[3, 10, 20, 30]] = False
    update(expected, x[keep], indices[keep], metric=metric)
    x[3, 0], x[10, 4], indices[20], indices[30] = torch.nan, torch.inf, -1, -1
    bins = update(state, x, indices, metric=metric)
    assert state.same_bits(expected)
    assert bins.sum() == 46


@pytest.mark.parametrize("wrong", [6, -2, 2**40])
def test_an_index_outside_the_codebook_is_named(wrong):
    state = make_state(6, 5)
    with pytest.raises(IndexError, match=r"0\.\.5.*" + str(wrong)):
        update(state, torch.zeros(3, 5), torch.tensor([0, wrong, 1]))


@pytest.mark.parametrize("native", [True, False])
def test_an_index_outside_its_codebook_is_not_one_of_the_codebook_beside_it(native, monkeypatch):
    monkeypatch.setattr(ops, "native_ops", lambda: native and native_ops())
    x = torch.ones(6, 4)
    bins = codebook_statistics(x, torch.tensor([0, -1, 1, 2, -1, -1]), 5, "cosine", 2).view(2, 5, -1)[..., 0]
    assert bins.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    for wrong in (5, -2):
        with pytest.raises(IndexError):
            codebook_statistics(x, torch.tensor([wrong, 0, 1, 2, 3, 4]), 5, "cosine", 2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(decay=1.5), ValueError, "decay"),
        (dict(metric="l1"), ValueError, "metric"),
        (dict(metric="euclidean"), ValueError, "embed_avg"),
        (dict(eps=-1.0), ValueError, "eps"),
        (dict(dead_after=5.0), ValueError, "idle"),
        (dict(codebook=torch.zeros(6, 5, dtype=torch.bfloat16)), TypeError, "codebook must be torch.float32"),
        (dict(cluster_size=torch.zeros(7)), ValueError, r"cluster_size must be \[6\]"),
        (dict(embed_avg=torch.zeros(6, 4)), ValueError, "embed_avg"),
        (dict(idle=torch.zeros(6)), TypeError, "idle must be torch.int64"),
        (dict(indices=torch.zeros(3)), ValueError, "indices"),
        (dict(x=torch.zeros(3, 4)), ValueError, "same D"),
    ],
)
def test_what_does_not_fit_is_named(change, error, match):
    arguments = dict(
        codebook=torch.zeros(6, 5),
        cluster_size=torch.zeros(6),
        x=torch.zeros(3, 5),
        indices=torch.zeros(3, dtype=torch.int64),
    )
    with pytest.raises(error, match=match):
        codebook_update(**{**arguments, **change})


@needs_native
def test_memory_does_not_grow_with_vectors_times_codes():
    x, indices = make_batch(200_000, 8192, 8)
    state = make_state(8192, 8, average=True)
    x = x.bfloat16()
    peak, _, _ = allocations(lambda: update(state, x, indices, metric="euclidean"))
    assert peak < 8192 * (1 + 2 * 8) * 8 + 8192 * 64  # the statistics, and less than one byte per vector and code


def test_state_that_is_a_view_is_updated_in_place():
    whole, plain = torch.zeros(6, 10), make_state(6, 5)
    state = plain.clone()
    whole[:, ::2] = state.codebook
    state.codebook = whole[:, ::2]
    x, indices = make_batch(50, 6, 5)
    update(state, x, indices)
    update(plain, x, indices)
    assert torch.equal(whole[:, ::2], plain.codebook)
    assert (whole[:, 1::2] == 0).all()


def test_it_compiles_to_one_graph_with_the_same_bits():
    x, indices = make_batch(40, 6, 5)
    state, compiled = make_state(6, 5), make_state(6, 5)
    update(state, x, indices)
    torch.compile(update, fullgraph=True, backend="aot_eager")(compiled, x, indices)
    assert state.same_bits(compiled)
