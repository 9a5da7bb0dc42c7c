"""codebook_update on a GPU: the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beitv2_fast.kernels.codebook_update.ops import codebook_statistics

from ..support.codebook_states import METRICS, State, make_batch, make_state, update
from ..support.gpu import DRY, HERE, cuda_only, here, no_waiting, pick

pytestmark = pytest.mark.gpu
RULES = [("cosine", False), ("cosine", True), ("euclidean", True)]  # metric, with embed_avg


def moved(state: State, device: str) -> State:
    tensors = (state.codebook, state.cluster_size, state.embed_avg, state.idle)
    return State(*(None if tensor is None else tensor.to(device, copy=True) for tensor in tensors))


def both(num_codes: int, dim: int, average: bool) -> tuple[State, State]:
    state = make_state(num_codes, dim, average=average)
    return state, moved(state, HERE)


def assert_same_step(ours: State, theirs: State, x: Tensor, indices: Tensor, **options) -> None:
    bins = update(theirs, x, indices, **options)
    assert torch.equal(update(ours, here(x), here(indices), **options).cpu(), bins)
    assert moved(ours, "cpu").same_bits(theirs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "num_codes", "dim"), [(5000, 300, 32), (777, 1, 33), (1000, 50, 256), (0, 4, 8)])
def test_five_steps_have_the_bits_of_the_cpu(count, num_codes, dim, dtype, metric):
    theirs, ours = both(num_codes, dim, metric == "euclidean")
    for step in range(5):
        x, indices = make_batch(count, num_codes, dim, seed=step)
        restart = dict(dead_below=0.5, dead_after=9000, restart_seed=step if step == 3 else None)
        assert_same_step(ours, theirs, x.to(dtype), indices, metric=metric, **restart)


@pytest.mark.parametrize(("metric", "average"), RULES)
@pytest.mark.parametrize(("count", "num_codes", "dim"), [(1, 1, 1), (1, 7, 5), (300, 40, 1), (3000, 65, 1024)])
def test_sizes_of_one_and_wide_vectors_have_the_bits_of_the_cpu(count, num_codes, dim, metric, average):
    theirs, ours = both(num_codes, dim, average)
    for step in range(2):
        x, indices = make_batch(count, num_codes, dim, seed=step)
        assert_same_step(ours, theirs, x, indices, metric=metric)


@pytest.mark.parametrize(("metric", "average"), RULES)
@pytest.mark.parametrize("options", [{"decay": 0.0, "eps": 0.0}, {"decay": 1.0}, {"decay": 0.5, "eps": 1.0}], ids=str)
def test_every_decay_and_eps_has_the_bits_of_the_cpu(options, metric, average):
    theirs, ours = both(60, 12, average)
    assert_same_step(ours, theirs, *make_batch(400, 60, 12), metric=metric, **options)


@pytest.mark.parametrize(("metric", "average"), RULES)
def test_padding_and_vectors_that_are_not_finite_are_left_out(metric, average):
    x, indices = make_batch(500, 30, 16)
    indices[::3] = -1
    x[1], x[4, 2], x[7, 0] = torch.nan, torch.inf, -torch.inf
    theirs, ours = both(30, 16, average)
    assert_same_step(ours, theirs, x, indices, metric=metric)
    counted = (indices >= 0) & x.isfinite().all(1)
    alone = make_state(30, 16, average=average)
    update(alone, x[counted], indices[counted], metric=metric)
    assert alone.codebook.equal(ours.codebook.cpu()) and alone.cluster_size.equal(ours.cluster_size.cpu())


@pytest.mark.parametrize("metric", METRICS)
def test_strides_and_the_order_of_the_rows_change_no_bit(metric):
    x, indices = (here(t) for t in make_batch(1000, 50, 24))
    order = torch.randperm(1000, device=HERE)
    expected = codebook_statistics(x, indices, 50, metric)
    for other, chosen in (
        (x[order], indices[order]),
        (x.T.contiguous().T, indices.repeat_interleave(3)[::3]),
        (torch.cat([x, x], 1)[:, :24], indices),
    ):
        assert torch.equal(codebook_statistics(other, chosen, 50, metric), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.9, 1.0])
def test_a_popular_code_has_the_bits_of_the_cpu(share, metric):
    x, indices = make_batch(pick(200_000, 2000), 300, 32)
    indices = torch.where(torch.rand(len(x)) < share, 7, indices)
    actual = codebook_statistics(here(x), here(indices), 300, metric)
    assert torch.equal(actual.cpu(), codebook_statistics(x, indices, 300, metric))


@pytest.mark.parametrize(("metric", "average"), RULES)
def test_restarts_take_the_vectors_that_the_cpu_draws(metric, average):
    theirs, ours = both(64, 16, average)
    x, indices = make_batch(40, 64, 16)  # fewer vectors than dead codes
    for seed in range(4):
        assert_same_step(ours, theirs, x, indices, metric=metric, dead_below=2.0, restart_seed=seed)


def test_state_that_is_a_view_is_updated_in_place():
    whole = here(torch.nn.functional.normalize(torch.randn(2, 30, 8), dim=-1))
    before, sizes = whole.clone(), torch.zeros(2, 30, device=HERE)
    x, indices = make_batch(200, 30, 8)
    state = State(whole[1], sizes[1], None, None)
    update(state, here(x), here(indices))
    assert torch.equal(whole[0], before[0]) and not torch.equal(whole[1], before[1])
    theirs = State(before[1].cpu(), torch.zeros(30), None, None)
    update(theirs, x, indices)
    assert torch.equal(whole[1].cpu(), theirs.codebook)


@pytest.mark.parametrize(("metric", "average"), RULES)
def test_the_host_waits_for_nothing(metric, average):
    theirs, ours = both(100, 32, average)
    x, indices = make_batch(500, 100, 32)
    options = dict(metric=metric, dead_below=0.5, restart_seed=1)
    assert_same_step(ours, theirs, x, indices, **options)  # compiles
    x_here, indices_here = here(x), here(indices)
    with no_waiting():
        update(ours, x_here, indices_here, **options)
    update(theirs, x, indices, **options)
    assert moved(ours, "cpu").same_bits(theirs)


@cuda_only
def test_a_captured_graph_moves_the_codebook_each_time_it_is_replayed():
    theirs, ours = both(100, 32, False)
    x, indices = make_batch(500, 100, 32)
    x_here, indices_here = here(x), here(indices)
    update(moved(theirs, HERE), x_here, indices_here)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(ours, x_here, indices_here)
    for _ in range(3):
        graph.replay()
        update(theirs, x, indices)
        assert moved(ours, "cpu").same_bits(theirs)


@pytest.mark.skipif(DRY, reason="on the CPU such an index is an error")
def test_an_index_outside_the_codebook_is_not_counted():
    theirs, ours = both(30, 16, False)
    x, indices = make_batch(200, 30, 16)
    wrong = indices.clone()
    wrong[::5], indices[::5] = 30, -1
    update(ours, here(x), here(wrong))
    update(theirs, x, indices)
    assert moved(ours, "cpu").same_bits(theirs)
