"""codebook_search's GPU kernels compiled for every target, in every configuration that autotuning may pick."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, Binary
from bench.gpu_kernels import Case, search_cases
from bench.gpu_model import estimate
from bench.gpu_peers import flash_kmeans_cases

pytest.importorskip("triton")


def _check(case: Case, target: str) -> Binary:
    binary = case.compile(target)
    told = f"{case.name}: {binary.summary()}"
    assert binary.fits, told
    assert binary.wide_loads > 0, told
    assert binary.blocks_per_sm * case.num_warps >= 4, told
    assert not case.tensor_core or binary.tensor_instructions, told
    return binary


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_default_problem_neither_spills_nor_exceeds_shared_memory(target: str, metric: str) -> None:
    for case in search_cases(target, metric=metric):
        _check(case, target)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize(("d", "k", "dtype"), [(64, 8192, "fp32"), (128, 8192, "bf16"), (768, 262_144, "fp32")])
def test_wide_codes_and_large_codebooks(target: str, d: int, k: int, dtype: str) -> None:
    for case in search_cases(target, d=d, k=k, metric="euclidean", dtype=dtype):
        if case.tensor_core:
            _check(case, target)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_hot_loop_costs_at_most_three_alu_instructions_per_score_on_sm_90(metric: str) -> None:
    for case in search_cases("sm_90", metric=metric):
        if case.tensor_core:  # 1 maximum per score and a share of the group's bookkeeping
            assert estimate(case, "sm_90").alu_per_unit < 1.6, case.name


@pytest.mark.parametrize("target", list(TARGETS))
def test_hot_loop_costs_fewer_alu_instructions_than_flash_kmeans(target: str) -> None:
    pytest.importorskip("flash_kmeans", reason="flash-kmeans is not installed")
    peer = next(flash_kmeans_cases())
    ours = min(estimate(case, target).alu_per_unit for case in search_cases(target) if case.tensor_core)
    assert ours < estimate(peer, target).alu_per_unit / 2
