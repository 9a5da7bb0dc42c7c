"""Kernel: gelu(x) and grad gelu'(x). Bytes per element: two read, two written; nothing else bounds it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_and_gradient_elements(x, grad, out, grad_x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.math.erf(v * 0.7071067811865476)  # Phi(v)
    density = 0.3989422804014327 * tl.exp(-0.5 * v * v)  # phi(v)
    tl.store(out + at, (v * below).to(out.dtype.element_ty), mask=mask)
    tl.store(grad_x + at, (g * (below + v * density)).to(grad_x.dtype.element_ty), mask=mask)
