"""codebook_update: its bits depend on nothing but the set of vectors and their codes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beitv2_fast.kernels.codebook_update.ops import apply_statistics, codebook_statistics
from beitv2_fast.kernels.codebook_update.reference import apply_statistics_reference, codebook_statistics_reference
from beitv2_fast.kernels.native import native_ops

from ..support.codebook_states import METRICS, make_batch, make_state, update

needs_native = pytest.mark.skipif(not native_ops(), reason="the C++ ops are not compiled")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def same_as_reference(x: Tensor, indices: Tensor, num_codes: int, metric: str) -> bool:
    ours = codebook_statistics(x, indices, num_codes, metric)
    return torch.equal(ours, codebook_statistics_reference(x, indices, num_codes, metric))


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 300),
    num_codes=st.integers(1, 70),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_native_statistics_have_the_bits_of_the_reference(count, num_codes, dim, dtype, metric, seed):
    x, indices = make_batch(count, num_codes, dim, seed)
    x = x.to(dtype)
    x[::11] = 0
    x[5::13, :1] = torch.nan
    x[7::17, -1:] = -torch.inf
    indices[3::19] = -1
    assert same_as_reference(x, indices, num_codes, metric)


@needs_native
@pytest.mark.parametrize("metric", METRICS)
def test_strided_vectors_and_indices_have_the_bits_of_the_reference(metric):
    x, indices = make_batch(60, 9, 24)
    assert same_as_reference(x[::2], indices[::2], 9, metric)
    assert same_as_reference(x.T.contiguous().T, indices, 9, metric)
    assert same_as_reference(x[:, ::3], indices, 9, metric)
    assert same_as_reference(x[:1].expand(60, -1), indices, 9, metric)
    assert same_as_reference(x[:, :1].expand(-1, 24).half(), indices[:1].expand(60), 9, metric)


@needs_native
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-12, 1e-6, 1.0, 3e8, 1e20, 1e38])
def test_vectors_of_any_magnitude_have_the_bits_of_the_reference(metric, scale):
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(3)) * scale
    x[1, 5:] = 0
    assert same_as_reference(x, torch.arange(40) % 3, 3, metric)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    num_codes=st.integers(1, 90),
    dim=st.integers(1, 70),
    metric=st.sampled_from(METRICS),
    average=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_second_pass_has_the_bits_of_the_reference(num_codes, dim, metric, average, seed):
    x, indices = make_batch(100, num_codes, dim, seed)
    state = make_state(num_codes, dim, average=average or metric == "euclidean", seed=seed)
    state.codebook[0, 0] = torch.nan if seed % 5 == 0 else 0.5
    statistics = codebook_statistics_reference(x, indices, num_codes, metric)
    other, options = state.clone(), (0.97, metric, 1e-5)
    bins = apply_statistics(statistics, state.codebook, state.cluster_size, state.embed_avg, *options)
    expected = apply_statistics_reference(statistics, other.codebook, other.cluster_size, other.embed_avg, *options)
    assert torch.equal(bins, expected)
    state.codebook.nan_to_num_(123)
    other.codebook.nan_to_num_(123)
    assert state.same_bits(other)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("popular", [False, True])
def test_bits_do_not_depend_on_row_order_or_threads(metric, popular):
    x, indices = make_batch(6000, 300, 16)
    indices = torch.where(torch.arange(6000) % 10 < 9, 7, indices) if popular else indices
    first = make_state(300, 16, average=metric == "euclidean")
    others = [first.clone() for _ in range(3)]
    update(first, x, indices, metric=metric)
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(2))
    update(others[0], x[order], indices[order], metric=metric)
    update(others[1], x.flip(0), indices.flip(0), metric=metric)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        update(others[2], x, indices, metric=metric)
    finally:
        torch.set_num_threads(threads)
    assert all(other.same_bits(first) for other in others)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bits_do_not_depend_on_the_split_over_ranks(metric, ranks):
    x, indices = make_batch(501, 40, 9)
    whole = codebook_statistics(x, indices, 40, metric)
    begins = [*range(0, 50 * ranks, 50)]  # shares of 50 rows, and what is left for the last
    shares = zip(x.tensor_split(begins), indices.tensor_split(begins), strict=True)
    assert torch.equal(sum(codebook_statistics(*share, 40, metric) for share in shares), whole)


RANK = """
import os, sys, torch, torch.distributed as dist
from tests.support.codebook_states import make_batch, make_state, update
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for metric in ("cosine", "euclidean"):
    x, indices = make_batch(500, 40, 9)
    share = slice(0, 137) if rank == 0 else slice(137, 500)
    state = make_state(40, 9, average=metric == "euclidean")
    for step in range(3):
        update(state, x[share], indices[share], metric=metric)
    torch.save([state.codebook, state.cluster_size, state.idle], f"{folder}/{metric}{rank}")
    update(state, x[share], indices[share], metric=metric, dead_below=2.0, restart_seed=step)
    torch.save([state.codebook, state.cluster_size, state.idle], f"{folder}/{metric}-restart{rank}")
dist.destroy_process_group()
os._exit(0)  # a thread of gloo may abort the interpreter while it is torn down
"""


@pytest.mark.slow
def test_two_ranks_hold_the_bits_of_one_process_and_restart_codes_alike(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    for metric in METRICS:
        x, indices = make_batch(500, 40, 9)
        state = make_state(40, 9, average=metric == "euclidean")
        for _ in range(3):
            update(state, x, indices, metric=metric)
        expected = [state.codebook, state.cluster_size, state.idle]
        first, second = (torch.load(tmp_path / f"{metric}{rank}") for rank in range(2))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, expected, strict=True))
        first, second = (torch.load(tmp_path / f"{metric}-restart{rank}") for rank in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        moved = (first[0] - state.codebook).abs().amax(1) > 0.1
        assert 0 < moved.sum() < 40


@pytest.mark.parametrize("metric", METRICS)
def test_between_the_passes_ranks_exchange_one_flat_buffer(metric, monkeypatch):
    exchanged = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, group: exchanged.append(t))
    update(make_state(40, 9, average=metric == "euclidean"), *make_batch(500, 40, 9), metric=metric)
    assert [(t.dtype, t.is_contiguous()) for t in exchanged] == [(torch.int64, True)]


def bits_of_an_update() -> str:
    digest = hashlib.sha256()
    for metric in METRICS:
        for dim in (5, 32, 100):
            state, (x, indices) = make_state(50, dim, average=metric == "euclidean"), make_batch(700, 50, dim)
            digest.update(codebook_statistics(x, indices, 50, metric).numpy().tobytes())
            update(state, x, indices, metric=metric)
            digest.update(state.codebook.numpy().tobytes() + state.cluster_size.numpy().tobytes())
    return digest.hexdigest()


PRINT_BITS = """
from tests.kernels.test_codebook_update_bits import bits_of_an_update
from beitv2_fast.kernels.native import native_ops
import torch
assert native_ops()
print(torch.ops.beitv2_fast_cpu.capability(), bits_of_an_update())
"""


@needs_native
def test_every_instruction_set_gives_the_same_bits():
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", PRINT_BITS],
            env={**os.environ, "BEITV2_FAST_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("portable", "avx2")
        if name in torch.ops.beitv2_fast_cpu.available_capabilities()
    }
    here = bits_of_an_update()
    for name, process in running.items():
        assert process.communicate()[0].split() == [name, here]
