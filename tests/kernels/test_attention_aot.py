"""The kernels of attention, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from bench.aot import LEAST_SHARED, TARGETS, Binary

from ..support.launches import binaries, launching

pytest.importorskip("triton")
from beitv2_fast.kernels.attention import triton as host

HEADS = 12


def compiled(target: str, tokens: int, width: int, of_bias: bool) -> dict[str, Binary]:
    """As they are launched for heads with a bias; ``of_bias``: which has a gradient."""
    qkv, out = (torch.empty(2, tokens, *shape, dtype=torch.bfloat16) for shape in ((3, HEADS, width), (HEADS, width)))
    lse, bias, scale = torch.empty(2, HEADS, tokens), torch.empty(HEADS, tokens, tokens), width**-0.5
    return binaries(
        target,
        lambda: host.attention_triton(qkv, bias, scale),
        lambda: host.attention_backward_triton(out, qkv, bias, out, lse, scale, of_bias),
    )


SIZES = [("sm_90", 65, 64), ("sm_90", 197, 64), ("sm_90", 577, 64), ("sm_90", 257, 80)]
SIZES += [(target, 577, 64) for target in TARGETS if target != "sm_90"]


@pytest.mark.parametrize(("target", "tokens", "width"), SIZES)
def test_nothing_spills_and_products_run_on_tensor_cores(target, tokens, width):
    with launching(target):
        apart = host.choose_plan(tokens, width).together is None
    found = compiled(target, tokens, width, of_bias=apart)
    del found["pack_bias"]
    assert len(found) == 3 + apart
    for binary in found.values():
        assert binary.fits and (target != "sm_80" or binary.shared <= LEAST_SHARED), binary.summary()
        assert binary.wide_loads >= 2, binary.summary()
        products = binary.tensor_instructions
        assert products and (target != "sm_90" or any(op.startswith("HGMMA") for op in products)), binary.summary()


@pytest.mark.parametrize("tokens", [65, 197])
def test_the_bias_s_gradient_is_summed_in_registers(tokens):
    """What does not fit beside 104 registers of sums was measured to cost less than smaller blocks that spill less.

    More would spill if addresses were kept from one image to the next, or a count of images became a constant.
    """
    binary = compiled("sm_90", tokens, 64, of_bias=True)["query_gradients"]
    assert binary.stack <= (0 if tokens == 65 else 192), binary.summary()
    assert binary.blocks_per_sm >= 2, binary.summary()
    assert all(op.startswith("HGMMA") for op in binary.tensor_instructions), binary.summary()
