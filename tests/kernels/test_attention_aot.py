"""The kernels of attention, compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.aot import TARGETS, Binary, compile_kernel

pytest.importorskip("triton")
from beitv2_fast.kernels.attention import triton as host
from beitv2_fast.kernels.attention.triton_backward import bias_gradients, key_gradients, query_gradients
from beitv2_fast.kernels.attention.triton_forward import attention_forward

TYPES = {
    **dict.fromkeys("qkv bias transposed out grad dqkv".split(), "*bf16"),
    **dict.fromkeys("lse delta partial".split(), "*fp32"),
    "images": "i32", "chunk": "i32", "factor": "fp32", "scale": "fp32",
}  # fmt: skip
HEADS = 12


def compiled(kernel, target: str, blocks: host.Blocks, tokens: int, width: int, together: bool = False) -> Binary:
    """As it is launched for heads with a bias; ``together``: DBIAS."""
    block_d = host.block_d(width)
    values = host.walk(blocks, tokens) | {"N": tokens, "H": HEADS, "D": width, "BLOCK_D": block_d}
    values |= {"SIDE": host.side(tokens), "BIAS": True, "DBIAS": together}
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    types = {name: kind for name, kind in TYPES.items() if name in kernel.arg_names}
    return compile_kernel(kernel, types, values, target, num_warps=blocks.num_warps, num_stages=blocks.stages)


def plan_of(target: str, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> host.Plan:
    monkeypatch.setattr(host, "target_name", lambda: target)
    return host.choose_plan(tokens, width)


def binaries(target: str, plan: host.Plan, tokens: int, width: int) -> Iterator[Binary]:
    """All kernels, but that with ``together``."""
    pairs = (attention_forward, plan.forward), (key_gradients, plan.keys), (query_gradients, plan.queries)
    for kernel, blocks in (*pairs, (bias_gradients, plan.bias)):
        yield compiled(kernel, target, blocks, tokens, width)


SIZES = [("sm_90", 65, 64), ("sm_90", 197, 64), ("sm_90", 577, 64), ("sm_90", 257, 80)]
SIZES += [(target, 577, 64) for target in TARGETS if target != "sm_90"]


@pytest.mark.parametrize(("target", "tokens", "width"), SIZES)
def test_nothing_spills_and_products_run_on_tensor_cores(target, tokens, width, monkeypatch):
    plan = plan_of(target, tokens, width, monkeypatch)
    for binary in binaries(target, plan, tokens, width):
        assert binary.fits, binary.summary()
        assert binary.wide_loads >= 2, binary.summary()
        products = binary.tensor_instructions
        assert products and (target != "sm_90" or any(op.startswith("HGMMA") for op in products)), binary.summary()


@pytest.mark.parametrize("tokens", [65, 197])
def test_the_bias_s_gradient_is_summed_in_registers(tokens, monkeypatch):
    """What does not fit beside 104 registers of sums was measured to cost less than smaller blocks that spill less.

    More would spill if addresses were kept from one image to the next, or a count of images became a constant.
    """
    plan = plan_of("sm_90", tokens, 64, monkeypatch)
    binary = compiled(query_gradients, "sm_90", plan.together, tokens, 64, together=True)
    assert binary.stack <= (0 if tokens == 65 else 192), binary.summary()
    assert binary.blocks_per_sm >= 2, binary.summary()
    assert all(op.startswith("HGMMA") for op in binary.tensor_instructions), binary.summary()
