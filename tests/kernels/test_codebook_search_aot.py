"""codebook_search's GPU kernels compiled for every target, in every configuration that autotuning may pick."""

from __future__ import annotations

import pytest

from bench.aot import LEAST_SHARED, TARGETS, Binary
from bench.gpu_kernels import Case, search_cases

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
    for case in search_cases(target, d=d, k=k, dtype=dtype):
        if case.tensor_core:
            _check(case, target)


@pytest.mark.parametrize(("d", "dtype"), [(64, "fp32"), (128, "bf16"), (128, "fp32"), (768, "fp32")])
def test_cards_with_less_shared_memory_have_a_configuration_that_fits(d: int, dtype: str) -> None:
    """Autotuning passes over those that do not."""
    cases = [case for case in search_cases("sm_80", d=d, dtype=dtype) if case.name.startswith("screen")]
    assert min(case.compile("sm_80").shared for case in cases) <= LEAST_SHARED
