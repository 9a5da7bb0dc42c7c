"""Attention probabilities of one layer: what a query token looks at. Models do not return them, for the fused kernels
never hold them; here that one layer is computed by its definition.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..models.attention import position_bias
from ..models.classifier import Classifier
from ..models.student import Student
from ..models.tokenizer import Tokenizer
from ..models.vit import Block, ViT

KEPT = 0.6  # the share of a head's attention that ``most_attended`` keeps, as the reference's visualize_attention.py


@torch.no_grad()
def attention_probabilities(
    model: Student | Classifier | Tokenizer, images: Tensor, layer: int | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias)`` of one block, with its position bias: [B, H, 1 + N, 1 + N] fp32, CLS first.

    Args:
        images: [B, 3, H, W] in [0, 1]; they are normalized as the model expects. Of a tokenizer, its encoder's layers.
        layer: counted from 1; None: the last, which the reference's ``get_last_selfattention`` gives.

    Raises:
        UserError: a layer that the model does not have.
    """
    from ..models.vit import normalize

    vit, views = (model.encoder, 2 * images - 1) if isinstance(model, Tokenizer) else (model, normalize(images))
    depth = len(vit.blocks)
    layer = depth if layer is None else layer
    if not 1 <= layer <= depth:
        raise UserError(f"layer {layer} does not exist: this model has layers 1 to {depth}. Choose one of them.")
    x, bias = _before(vit, views, layer)
    return _probabilities(list(vit.blocks)[layer - 1], x, bias)


def _before(vit: ViT, views: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
    """The tokens that a layer reads, and the bias that all blocks share."""
    x, bias = vit.embed(views), vit.position_bias()
    for block in islice(vit.blocks, layer - 1):
        x = vit.run_block(block, x, bias)
    return x, bias


def _probabilities(block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
    attn, x = block.attn, block.norm1(x)
    B, N, C = x.shape
    qkv_bias = torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])
    qkv = F.linear(x, attn.qkv.weight, qkv_bias).float().view(B, N, 3, attn.heads, C // attn.heads)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
    if attn.own_bias:
        bias = position_bias(attn)
    scores = q @ k.transpose(-2, -1) * (C // attn.heads) ** -0.5
    return torch.softmax(scores if bias is None else scores + bias.float(), dim=-1)


def query_attention(probabilities: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """What a patch looks at: [B, H, 1 + N, 1 + N] -> [B, H, h, w], its attention to every patch (CLS left out)."""
    found: Tensor = probabilities[:, :, 1 + patch, 1:].unflatten(-1, grid)
    return found


def most_attended(attention: Tensor, share: float = KEPT) -> Tensor:
    """The fewest patches that hold more than ``share`` of each head's attention: [..., h, w] -> bool [..., h, w].

    As the reference's visualize_attention.py cuts its maps: sorted rising, the patches after the first ``1 - share``.
    """
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1)
    rising = (values / values.sum(-1, keepdim=True)).cumsum(-1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, rising > 1 - share)
    return kept.view(attention.shape)
