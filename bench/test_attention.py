"""Attention with a learned bias, and the whole backbone beside timm's: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast.kernels.attention.reference import attention_reference
from beitv2_fast.models.attention import attend, choose_attention
from beitv2_fast.models.classifier import Classifier, ClassifierConfig
from beitv2_fast.models.vit import ViTConfig
from bench.harness import DEVICE, OURS, Unavailable, measure

B, N, H, D = 8, 197, 12, 64
Attention = Callable[[Tensor, Tensor], Tensor]  # qkv [B, N, 3, H, D], bias [1, H, N, N] -> [B, N, H * D]


def ours(qkv: Tensor, bias: Tensor) -> Tensor:
    return attend(qkv, bias, choose_attention("auto", DEVICE.type))


def softmax(qkv: Tensor, bias: Tensor) -> Tensor:
    return attention_reference(qkv, bias, qkv.shape[-1] ** -0.5)[0].flatten(2)


def sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2).flatten(2)


def flex(qkv: Tensor, bias: Tensor) -> Tensor:
    """flex_attention, compiled; on the CPU it has no backward.

    Tiles of an fp32 bias would take 240 KiB of shared memory, where Hopper has 227; in bf16 all take 114. Its gradient
    is summed in fp32.
    """
    from torch.nn.attention.flex_attention import flex_attention

    global _flex
    if _flex is None:
        _flex = torch.compile(flex_attention)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = bias.to(q.dtype)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    return _flex(q, k, v, score_mod=add_bias).transpose(1, 2).flatten(2)


_flex: Callable | None = None
ATTENTIONS: dict[str, Attention] = {OURS: ours, "matmul + softmax": softmax, "F.sdpa": sdpa, "flex_attention": flex}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(benchmark, name: str, dtype: torch.dtype, backward: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, 3, H, D, generator=generator).to(DEVICE, dtype).requires_grad_(backward)
    bias = torch.randn(1, H, N, N, generator=generator).to(DEVICE).requires_grad_(backward)
    grad = torch.randn(B, N, H * D, generator=generator).to(DEVICE, dtype)

    def run() -> object:
        out = ATTENTIONS[name](qkv, bias)
        return torch.autograd.grad(out, (qkv, bias), grad) if backward else out

    if name == "flex_attention" and DEVICE.type == "cpu" and backward:
        pytest.skip("flex_attention has no backward on the CPU")
    what = "forward backward, bias with gradient" if backward else "forward"
    measure(
        benchmark, f"attention B={B} N={N} H={H} d={D} {what} {'bf16' if dtype.itemsize == 2 else 'fp32'}", name, run
    )


def our_backbone() -> torch.nn.Module:
    return Classifier(ClassifierConfig(ViTConfig(position="relative", layer_scale=0.1)))


def our_backbone_with_shared_bias() -> torch.nn.Module:
    return Classifier(ClassifierConfig(ViTConfig(position="shared_relative", layer_scale=0.1)))


def timms() -> torch.nn.Module:
    try:
        import timm
    except ImportError as error:
        raise Unavailable("timm is not installed") from error
    return timm.create_model("beitv2_base_patch16_224", num_classes=1000)


BACKBONES = {OURS: our_backbone, f"{OURS}, one bias for all layers": our_backbone_with_shared_bias, "timm": timms}


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast"])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(benchmark, name: str, precision: str) -> None:
    torch.manual_seed(0)
    try:
        model = BACKBONES[name]().to(DEVICE).train()
    except Unavailable as error:
        pytest.skip(str(error))
    images, labels = torch.rand(4, 3, 224, 224, device=DEVICE), torch.arange(4, device=DEVICE)

    def run() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled="bf16" in precision):
            loss = F.cross_entropy(model(images), labels)
        model.zero_grad(set_to_none=True)
        loss.backward()

    measure(benchmark, f"ViT-B/16 224 classifier, 4 images, forward backward {precision}", name, run)
