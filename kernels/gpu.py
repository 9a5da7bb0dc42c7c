"""What every launch of Triton kernels needs to know of the GPU. Imported by the launches only: it needs Triton."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor


def target_name() -> str:
    """The family of the current device, by which launches choose: wgmma exists on 9.x only, tcgen05 on 10.x, mma
    everywhere."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return _family(triton.runtime.driver.active.get_current_device())


@cache
def _family(device: int) -> str:
    """Asked once, as every answer takes torch some microseconds; ``device`` is the current one."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.get_device())  # of the CPU -1, which changes nothing; a number costs the host less


# Triton's own of the same names are made for kernels: on the host a call costs 5 to 9 us, as much as an op of torch.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
