"""The tools themselves: interpreted runs, bf16 in the interpreter against torch, guard pages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from ..support.triton_tools import guarded

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.interpreted

SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875, 3.3895314e38, 1e-40])


@triton.jit
def _copy(source, target, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n if MASKED else at < n + BLOCK
    tl.store(target + at, tl.load(source + at, mask=mask).to(target.dtype.element_ty), mask=at < n)


@triton.jit
def _binary(a, b, out, n, BLOCK: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at, mask=at < n), tl.load(b + at, mask=at < n)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "max":
        z = tl.maximum(x, y)
    else:
        z = tl.where(x < y, x, y)
    tl.store(out + at, z, mask=at < n)


@triton.jit
def _dot(a, b, out, total, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = row * BLOCK + column
    product = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, product)
    tl.store(total + tl.arange(0, BLOCK), tl.sum(tl.load(a + at), axis=1))


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty(values.shape, dtype=dtype)
    _copy[(1,)](values, result, values.numel(), BLOCK=1024, MASKED=True)
    return result


def test_kernels_run_interpreted_on_cpu_tensors() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    values = torch.randn(1000)
    torch.testing.assert_close(_cast(values, torch.float32), values, rtol=0, atol=0)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_fp32_rounds_to_nearest_even(target: torch.dtype) -> None:
    values = torch.cat([SPECIAL, torch.randn(900) * torch.logspace(-38, 38, 900)])
    torch.testing.assert_close(_cast(values, target), values.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32])
def test_bfloat16_converts_by_value(target: torch.dtype) -> None:
    values = (torch.randn(1000) * 100).bfloat16()
    torch.testing.assert_close(_cast(values, target), values.to(target), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "expected"), [("add", torch.add), ("mul", torch.mul), ("max", torch.maximum), ("min", torch.minimum)]
)
def test_bfloat16_arithmetic_equals_torch(op: str, expected) -> None:
    a, b = torch.randn(2, 1000).bfloat16()
    out = torch.empty_like(a)
    _binary[(1,)](a, b, out, 1000, BLOCK=1024, OP=op)
    torch.testing.assert_close(out, expected(a, b), rtol=0, atol=0)


def test_bfloat16_dot_and_sum_use_the_values() -> None:
    a, b = torch.randn(2, 64, 64).bfloat16()
    out, total = torch.empty(64, 64), torch.empty(64, dtype=torch.bfloat16)
    _dot[(1,)](a, b, out, total, BLOCK=64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total, a.float().sum(1).bfloat16(), rtol=0, atol=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_guarded_tensor_holds_its_values_up_to_the_last_byte(dtype: torch.dtype) -> None:
    values = torch.arange(1023).reshape(11, 93).to(dtype)
    copy = guarded(values)
    assert copy.is_contiguous() and torch.equal(copy, values)
    assert (copy.data_ptr() + copy.numel() * copy.element_size()) % 4096 == 0


def test_a_masked_kernel_stays_off_the_guard_page() -> None:
    values = guarded(torch.randn(1000))
    result = guarded(torch.zeros(1000))
    _copy[(1,)](values, result, 1000, BLOCK=1024, MASKED=True)
    assert torch.equal(values, result)


def test_a_missing_mask_crashes() -> None:
    code = (
        "import torch; from tests.support.triton_tools import guarded;"
        "from tests.kernels.test_triton_interpreter import _copy;"
        "_copy[(1,)](guarded(torch.zeros(1000)), torch.zeros(1000), 1000, BLOCK=1024, MASKED=False)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGSEGV
