"""bench.gpu_model: instructions land in their pipes and the slowest resource sets the time."""

from __future__ import annotations

import pytest

from bench import gpu_model
from bench.aot import TARGETS, Binary, Instruction
from bench.gpu_kernels import Case

SASS = """
.L_x_0:
        /*0000*/                   HGMMA.64x128x16.F32 R24, gdesc[UR20], RZ, !UPT ;
        /*0010*/                   FMNMX R1, R2, R3, !PT ;
        /*0020*/              @!P0 FMNMX R1, R2, R3, !PT ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R25], desc[UR16][R6.64] ;
        /*0050*/                   UIADD3 UR4, UR4, 0x80, URZ ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("backend", "opcode", "pipe"),
    [
        ("cuda", "HGMMA.64x128x16.F32.BF16", "tensor"),
        ("cuda", "UTCHMMA", "tensor"),
        ("cuda", "IMAD.WIDE.U32", "fma"),
        ("cuda", "FMNMX3", "alu"),
        ("cuda", "DFMA", "fp64"),
        ("cuda", "F2F.F64.F32", "special"),
        ("cuda", "LDSM.16.M88.4", "memory"),
        ("cuda", "ULEA", "uniform"),
        ("cuda", "DEPBAR.LE", "other"),
        ("hip", "v_mfma_f32_32x32x8_f16", "tensor"),
        ("hip", "v_max3_i32", "alu"),
        ("hip", "v_fma_f64", "fp64"),
        ("hip", "ds_read_b128", "memory"),
        ("hip", "s_add_i32", "uniform"),
        ("hip", "s_waitcnt", "other"),
    ],
)
def test_an_instruction_belongs_to_its_pipe(backend: str, opcode: str, pipe: str) -> None:
    assert gpu_model.pipe(Instruction(opcode, opcode), backend) == pipe


def _estimate(monkeypatch: pytest.MonkeyPatch, **work: float) -> gpu_model.Estimate:
    binary = Binary(TARGETS["sm_90"], 4, 32, 0, 0, 0, 0, SASS)
    monkeypatch.setattr(Case, "compile", lambda self, target: binary)
    work = {"programs": 132, "steps": 1000, "units": 64, "flops": 1, "read": 1, "written": 0, "l2": 1} | work
    return gpu_model.estimate(Case("op", "name", None, {}, {}, num_warps=4, **work), "sm_90")


def test_the_hot_loop_is_counted_by_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = _estimate(monkeypatch)
    assert estimate.pipes == {"tensor": 1, "alu": 2, "fma": 1, "memory": 1, "uniform": 1, "other": 1}
    assert estimate.alu_per_unit == 2 * 128 / 64


def test_the_slowest_resource_sets_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = _estimate(monkeypatch)
    assert estimate.bound == "issue"  # 7 instructions per step through 4 slots per clock: 7 clocks
    assert estimate.seconds["issue"] == pytest.approx(7000 / 1.755e9)
    assert estimate.seconds["alu"] == pytest.approx(4000 / 1.755e9)
    assert _estimate(monkeypatch, read=3.35e12).bound == "DRAM"
    assert _estimate(monkeypatch, flops=1e15).bound == "tensor"


def test_a_last_round_that_is_not_full_takes_as_long_as_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = _estimate(monkeypatch), _estimate(monkeypatch, programs=133)
    assert two.seconds["alu"] == 2 * one.seconds["alu"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent():
        raise ImportError("No module named 'flash_kmeans'")

    monkeypatch.setattr(gpu_model, "CASES", ())
    monkeypatch.setattr(gpu_model, "cut_cross_entropy_cases", lambda: iter(()))
    monkeypatch.setattr(gpu_model, "flash_kmeans_cases", lambda **_: absent())
    assert "flash-kmeans is left out: No module named 'flash_kmeans'" in gpu_model.table("sm_90")
