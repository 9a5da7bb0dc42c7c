"""codebook_search's GPU kernels compiled for every target, in every configuration that autotuning may pick."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS, Binary
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
    for case in search_cases(target, d=d, k=k, metric="euclidean", dtype=dtype):
        if case.tensor_core:
            _check(case, target)


# Instructions of the ALU pipe by the prefix of their opcode; FFMA, FADD and FMUL run beside them in the FMA pipe.
ALU = ("FMNMX", "LOP3", "FSETP", "FSEL", "ISETP", "SEL", "IADD3", "VIADD", "VIMNMX", "SHF", "LEA", "PLOP3", "PRMT")


def alu_a_score(case: Case, target: str) -> float:
    binary = case.compile(target)
    alu = sum(i.opcode.split(".")[0] in ALU for i in binary.hot_loop())
    return alu * case.num_warps * TARGETS[target].warp / case.units


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_hot_loop_costs_at_most_three_alu_instructions_a_score_on_sm_90(metric: str) -> None:
    for case in search_cases("sm_90", metric=metric):
        if case.tensor_core:
            assert alu_a_score(case, "sm_90") < 1.6, case.name  # 1 maximum and a share of the group's bookkeeping
