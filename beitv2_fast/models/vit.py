"""The Vision Transformer that every model here is made of. Parameter names are those of the published checkpoints.

image [B, 3, H, W] -> patch tokens [B, h*w, C] -> [CLS; patches] -> blocks -> [B, 1 + h*w, C]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import require_floating
from .attention import attention, prepare_bias
from .linear import Linear, linear

POSITIONS = ("absolute", "shared_relative", "relative", "none")
SIZES: dict[str, dict[str, int]] = {  # ViT-S/16, B/16, L/16, H/14: ViTConfig(**SIZES["large"], ...)
    "small": {"dim": 384, "depth": 12, "heads": 6, "patch_size": 16},
    "base": {"dim": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "large": {"dim": 1024, "depth": 24, "heads": 16, "patch_size": 16},
    "huge": {"dim": 1280, "depth": 32, "heads": 16, "patch_size": 14},
}


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a ViT. Defaults: ViT-B/16 with BEiT's shared relative position bias."""

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    position: str = "shared_relative"  # one of POSITIONS; "relative" has a bias table in every block
    layer_scale: float = 0.0  # initial value; 0 means no layer scale
    drop_path: float = 0.0  # rate of the last block, growing linearly from 0 at the first
    eps: float = 1e-6  # of every LayerNorm
    init_std: float = 0.02  # of the initial weights, for a width of 768; narrow models start to learn sooner with more
    attention: str = "auto"  # what computes attention, one of attention.IMPLEMENTATIONS
    checkpointing: bool = False  # blocks keep their input alone and compute the rest again in backward

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}; got {self.position!r}")

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each: [B, c, H, W] of any float dtype -> [B, h*w, C] of the weights'."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.image_size = config.image_size
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels or x.shape[2:] != (self.image_size, self.image_size):
            expected = [self.proj.in_channels, self.image_size, self.image_size]
            raise ValueError(f"this model reads images [B, {str(expected)[1:]}; got {list(x.shape)}")
        if x.is_floating_point():
            x = x.to(self.proj.weight.dtype)
        return self.proj(x).flatten(2).transpose(1, 2)


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """For query i and key j (CLS first) the row of the bias table: [1 + h*w, 1 + h*w] int64.

    Rows 0..(2h-1)(2w-1)-1 are offsets between patches; then CLS to patch, patch to CLS, CLS to CLS.
    """
    h, w = grid
    coords = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)  # [2, h*w]
    offset = coords[:, :, None] - coords[:, None, :]  # [2, h*w, h*w]
    rows = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(h * w + 1, h * w + 1, dtype=torch.int64)
    index[1:, 1:] = (offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1
    index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


class RelativePositionBias(nn.Module):
    """A learned bias a head for every offset between two tokens: [1, H, N, N] with N = 1 + h*w."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        add_bias_table(self, config)

    def forward(self) -> Tensor:
        return position_bias(self)


def add_bias_table(module: nn.Module, config: ViTConfig) -> None:
    """Give a module the table and its index: the model has one, or every attention its own (after fine-tuning)."""
    h, w = config.grid
    module.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, config.heads))
    module.register_buffer("relative_position_index", relative_position_index(config.grid), persistent=False)
    module.implementation = config.attention


def position_bias(module: nn.Module) -> Tensor:
    bias = F.embedding(module.relative_position_index, module.relative_position_bias_table)  # [N, N, H]
    return prepare_bias(bias.permute(2, 0, 1).unsqueeze(0).contiguous(), module.implementation)


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values only, and an optional bias table of its own."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads, self.implementation = config.heads, config.attention
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = Linear(config.dim, config.dim)
        self.own_bias = config.position == "relative"
        if self.own_bias:
            add_bias_table(self, config)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        B, N, C = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, qkv_bias).view(B, N, 3, self.heads, C // self.heads)
        if self.own_bias:
            bias = position_bias(self)
        return self.proj(attention(qkv, bias, self.implementation))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim, gelu=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drop the residual of whole samples with probability ``rate`` and scale the others by 1 / (1 - rate)."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block: x + g1 * attn(norm1(x)), then x + g2 * mlp(norm2(x)); g is the layer scale."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))
        self.drop_path = drop_path
        if config.layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        else:
            self.gamma_1 = self.gamma_2 = None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self._residual(self.attn(self.norm1(x), bias), self.gamma_1)
        return x + self._residual(self.mlp(self.norm2(x)), self.gamma_2)

    def _residual(self, branch: Tensor, gamma: Tensor | None) -> Tensor:
        return drop_path(branch if gamma is None else gamma * branch, self.drop_path, self.training)


class ViT(nn.Module):
    """Patch embedding, CLS token, positions and blocks, without a final norm or head: its users add theirs."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vit_config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = self.rel_pos_bias = None
        if config.position == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.dim))
        elif config.position == "shared_relative":
            self.rel_pos_bias = RelativePositionBias(config)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)

    @property
    def grid(self) -> tuple[int, int]:
        return self.vit_config.grid

    def no_weight_decay(self) -> set[str]:
        """The parameters that weight decay spares beside those of one dimension, as the reference's."""
        return {name for name in ("cls_token", "pos_embed") if getattr(self, name) is not None}

    def embed(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images [B, c, H, W] (and mask [B, N] bool: those patches become the mask token) -> tokens [B, 1 + N, C].

        Raises:
            TypeError: the images are integers.
        """
        require_floating(images)
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[:, :, None], mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def position_bias(self) -> Tensor | None:
        """The relative position bias that all blocks share, computed once a forward."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def run_block(self, block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
        """A block, or in training with ``checkpointing`` the same bits without its activations kept for backward."""
        if self.vit_config.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, bias, use_reentrant=False)
        return block(x, bias)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Images -> the last block's tokens [B, 1 + N, C]."""
        x, bias = self.embed(images), self.position_bias()
        for block in self.blocks:
            x = self.run_block(block, x, bias)
        return x


def init_weights(model: nn.Module, std: float) -> None:
    """Truncated normal, cut at two std, for linear, convolution, tokens and positions; zeros for biases."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "relative_position_bias_table" not in name:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        elif name.endswith("bias") or name.endswith("relative_position_bias_table"):
            nn.init.zeros_(parameter)


def rescale_outputs(block: Block, layer: int) -> None:
    """Divide the output projections of layer ``layer`` (counted from 1) by sqrt(2 layer), as BEiT does."""
    with torch.no_grad():
        block.attn.proj.weight.div_((2.0 * layer) ** 0.5)
        block.mlp.fc2.weight.div_((2.0 * layer) ** 0.5)
