"""The compiled library: its ops run on torch's own threads, and one from other sources is not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beitv2_fast import kernels
from beitv2_fast.kernels import native
from beitv2_fast.kernels.native import native_ops

LIBRARIES = sorted(Path(kernels.__file__).parent.glob("_cpu*.so"))
pytestmark = [
    pytest.mark.skipif(not LIBRARIES, reason="the C++ ops were not compiled"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and the symbols of GCC's OpenMP"),
]


def test_the_ops_were_compiled_with_threads():
    assert b"GOMP_parallel" in LIBRARIES[0].read_bytes()


def test_they_bring_no_openmp_of_their_own():
    assert native_ops()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(mapped) == 1


def test_a_library_from_older_sources_is_not_used_and_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(native, "OPS", (*native.OPS, "op_of_tomorrow"))
    native_ops.cache_clear()
    try:
        with pytest.warns(UserWarning, match="older sources, without op_of_tomorrow"):
            assert not native_ops()
    finally:
        native_ops.cache_clear()


def test_under_another_name_the_folder_registers_no_second_copy_of_the_ops():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels; kernels.codebook_search"
    command = [sys.executable, "-c", code, str(native.FOLDER.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "AttributeError: codebook_search: this folder is imported as beitv2_fast.kernels" in result.stderr
