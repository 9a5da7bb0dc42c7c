"""What tests of Triton kernels need without a GPU: a bf16 that the interpreter computes right, and guard pages.

Interpreted tests: put ``pytestmark = pytest.mark.interpreted`` in a module of this folder; see conftest.py. There,
kernels run on CPU tensors, launched as on a GPU. Kernels that are compiled for a GPU: ``launches``.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

PROT_NONE = 0


def correct_bfloat16() -> None:
    """Make Triton's interpreter compute bf16 as GPUs do: fp32 arithmetic, rounded to nearest even on every store.

    On its own it keeps bf16 as the 16 raw bits, adds and multiplies those as integers, truncates fp32 to bf16 and
    turns NaN into Inf. Here every builder method and reduction sees fp32 in place of bf16 operands, and its fp32
    result is rounded back when the result's type is bf16. Comparisons give booleans, of scalars as well.
    """
    import triton.language as tl
    from triton.runtime import interpreter as interp

    if getattr(interp.InterpreterBuilder, "_bfloat16_is_corrected", False):
        return

    def widen(handle: object) -> object:
        if isinstance(handle, interp.TensorHandle) and handle.dtype.scalar == tl.bfloat16:
            return interp.TensorHandle(bfloat16_to_float32(handle.data), tl.float32)
        return handle

    def narrow(handle: object) -> object:
        if isinstance(handle, interp.TensorHandle) and handle.dtype.scalar == tl.float32:
            return interp.TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)
        return handle

    def arithmetic(original):
        def method(self, *operands):
            result = original(self, *(widen(operand) for operand in operands))
            return narrow(result) if any(o is not widen(o) for o in operands) else result

        return method

    def comparison(original):
        # int1, not the operands' type: a scalar condition keeps it when it is broadcast to a block.
        return lambda self, a, b: interp.TensorHandle(original(self, widen(a), widen(b)).data, tl.int1)

    def cast(original):
        def method(self, source, destination, *rest):
            if tl.bfloat16 not in (source.dtype.scalar, destination.scalar):
                return original(self, source, destination, *rest)
            source = widen(source)
            if destination.scalar == tl.bfloat16:
                return narrow(interp.TensorHandle(source.data.astype(np.float32), tl.float32))
            return source if destination.scalar == tl.float32 else original(self, source, destination, *rest)

        return method

    def dot(original):
        def method(self, a, b, accumulator, *rest):
            result = original(self, widen(a), widen(b), widen(accumulator), *rest)
            return narrow(result) if accumulator.dtype.scalar == tl.bfloat16 else result

        return method

    builder = interp.InterpreterBuilder
    orders = [f"fcmp{o}{kind}" for o in "OU" for kind in ("LT", "LE", "GT", "GE", "EQ", "NE")]
    orders += [f"icmp{o}{kind}" for o in "SU" for kind in ("LT", "LE", "GT", "GE")] + ["icmpEQ", "icmpNE"]
    for wrap, names in (
        (arithmetic, "fadd fsub fmul fdiv frem fneg fma minimumf minnumf maximumf maxnumf clampf precise_divf"),
        (arithmetic, "exp exp2 log log2 sin cos sqrt precise_sqrt rsqrt floor ceil erf"),
        (comparison, " ".join(orders)),
        (cast, "si_to_fp ui_to_fp fp_to_si fp_to_ui fp_ext fp_trunc fp_to_fp"),
        (dot, "dot"),
    ):
        for name in [n for n in names.split() if hasattr(builder, f"create_{n}")]:
            setattr(builder, f"create_{name}", wrap(getattr(builder, f"create_{name}")))
    builder.get_bf16 = lambda self, value: narrow(self.get_fp32(value))

    apply_impl = interp.ReduceOps.apply_impl

    def reduce(self, inputs):
        if inputs[0].dtype != tl.bfloat16:
            return apply_impl(self, inputs)
        results = apply_impl(self, tuple(i.to(tl.float32) if i.dtype == tl.bfloat16 else i for i in inputs))
        results = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(r.to(tl.bfloat16) if r.dtype == tl.float32 else r for r in results)

    interp.ReduceOps.apply_impl = reduce
    builder._bfloat16_is_corrected = True


def correct_scalars() -> None:
    """Let scalars of kernels bound loops: they are arrays of one element, of which NumPy from 2.4 on makes no integers.

    Triton 3.8 takes the element out itself, 3.6 does not.
    """
    from triton.runtime import interpreter as interp

    patch = interp._patch_lang_tensor

    def patch_and_correct(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interp._patch_lang_tensor = patch_and_correct


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy of ``tensor`` whose last byte is the last one before a page that no one may touch.

    A kernel that reads or writes behind the end dies with SIGSEGV, which fails the interpreted test that ran it.
    """
    size = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(start + (pages - 1) * page)
    if libc.mprotect(last, ctypes.c_size_t(page), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect of the guard page failed")
    if size == 0:
        return torch.empty_like(tensor)
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=(pages - 1) * page - size)
    return view.view(tensor.shape).copy_(tensor)


def untouched(size: int, dtype: torch.dtype) -> Tensor:
    """``size`` zeros that cost memory only where they are written, a page at a time."""
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE), dtype=dtype)
