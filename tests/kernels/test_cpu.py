"""Which CPUs multiply bf16 matrices faster than fp32 ones."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast import distributed
from beitv2_fast.kernels import cpu


@pytest.mark.parametrize(
    ("vendor", "amx", "avx512_bf16", "fast"),
    [
        ("GenuineIntel", True, True, True),
        ("GenuineIntel", False, True, False),
        ("AuthenticAMD", False, True, True),
        ("AuthenticAMD", False, False, False),
        (None, False, True, False),
    ],
)
def test_bf16_is_fast_with_amx_and_on_amd_s_with_avx512_bf16(tmp_path, monkeypatch, vendor, amx, avx512_bf16, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(cpu, "ABOUT", tmp_path / "cpuinfo")
    if vendor is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert cpu.fast_bf16() == fast


@pytest.mark.parametrize("fast", [False, True])
def test_auto_follows_it(monkeypatch, fast):
    monkeypatch.setattr(distributed, "FAST_BF16", fast)
    assert distributed.autocast_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else None)
