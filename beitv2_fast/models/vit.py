"""The Vision Transformer that every model here is made of. Parameter names are those of the published checkpoints.

image [B, 3, H, W] -> patch tokens [B, h*w, C] -> [CLS; patches] -> blocks -> [B, 1 + h*w, C]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import gelu_and_gradient, residual_norm
from ..kernels.cpu import FAST_BF16
from .attention import RelativePositionBias, add_bias_table, attend, position_bias

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
POSITIONS = ("absolute", "shared_relative", "relative", "none", "absolute_shared_relative", "absolute_relative")
SIZES: dict[str, dict[str, Any]] = {  # ViT-S/16, B/16, L/16, H/14: ViTConfig(**SIZES["large"], ...)
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
    position: str = "shared_relative"  # one of POSITIONS; "relative": a bias table in every block; absolute_...: both
    layer_scale: float = 0.0  # initial value; 0 means no layer scale
    drop_path: float = 0.0  # rate of the last block, growing linearly from 0 at the first
    eps: float = 1e-6  # of every LayerNorm
    init_std: float = 0.02  # see ``init_weights``; for a width of 768: narrow models start to learn sooner with more
    attention: str = "auto"  # what computes attention, one of attention.IMPLEMENTATIONS
    checkpointing: bool = False  # blocks keep only their input and compute the rest again in backward

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}; got {self.position!r}")

    @property
    def absolute(self) -> bool:
        return self.position.startswith("absolute")

    @property
    def shared_table(self) -> bool:
        return self.position.endswith("shared_relative")

    @property
    def own_tables(self) -> bool:
        return self.position.endswith("relative") and not self.shared_table

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


class Linear(nn.Linear):
    """``nn.Linear``, or with ``gelu`` the one after an exact GELU; same parameters, same values."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool = False):
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=self.gelu)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """``x W^T + b``, or with ``gelu`` ``gelu(x) W^T + b``: [..., in] -> [..., out]; under autocast in its dtype.

    It keeps less for backward: with ``gelu`` only x; gelu(x), as large, is computed again, an elementwise pass beside
    three matrix products. Under bf16 autocast on a CPU that is slow at bf16 products (``kernels.cpu``) their operands
    are widened to fp32: activations stay bf16 in memory; weights and their gradients are not rounded.

    Differentiable once. Compiled or without gradients it is PyTorch's own, since compilers choose themselves what to
    keep; on a GPU without ``gelu`` too, where it would keep the same and cost the host more.
    """
    plain = x.is_cuda and not gelu and x.dtype != torch.float64
    if plain or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(F.gelu(x) if gelu else x, weight, bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if x.dtype == torch.float64:
        dtype = x.dtype
    out: Tensor = _Linear.apply(x.to(dtype), weight, bias, gelu)
    return out


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the operands of a product are widened to."""
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not FAST_BF16
    return torch.float32 if slow else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        dtype = _product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            a = (F.gelu(x) if gelu else x).to(dtype)
            return F.linear(a, weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dtype = _product_dtype(x)
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [M, out]
            in_one_pass = ctx.gelu and x.is_cuda and all(ctx.needs_input_grad[:2])
            if in_one_pass:
                a, grad_x = gelu_and_gradient(x, (g @ weight.to(dtype)).view(x.shape))
            if ctx.needs_input_grad[1]:
                a = a if in_one_pass else F.gelu(x) if ctx.gelu else x
                a = a.reshape(-1, x.shape[-1]).to(dtype)
                grad_weight = (g.t() @ a).to(weight.dtype)
                del a
            if ctx.needs_input_grad[2]:
                grad_bias = g.sum(0).to(weight.dtype)
            if ctx.needs_input_grad[0] and not in_one_pass:
                grad_x = (g @ weight.to(dtype)).to(x.dtype).view(x.shape)
                if ctx.gelu:
                    grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, grad_weight, grad_bias, None


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
        patches: Tensor = self.proj(x)  # [B, C, h, w]
        return patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values only, and an optional bias table of its own."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads, self.implementation = config.heads, config.attention
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = Linear(config.dim, config.dim)
        self.own_bias = config.own_tables
        if self.own_bias:
            add_bias_table(self, config.grid, config.heads, config.attention)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        B, N, C = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, qkv_bias).view(B, N, 3, self.heads, C // self.heads)
        if self.own_bias:
            bias = position_bias(self)
        out: Tensor = self.proj(attend(qkv, bias, self.implementation))
        return out


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim, gelu=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: x + g1 * attn(norm1(x)), then x + g2 * mlp(norm2(x)); g is the layer scale."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))
        self.drop_path = drop_path
        self.gamma_1: nn.Parameter | None
        self.gamma_2: nn.Parameter | None
        if config.layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        else:
            self.gamma_1 = self.gamma_2 = None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x, normed = residual_norm(x, weight=self.norm1.weight, bias=self.norm1.bias, eps=self.norm1.eps)
        x, normed = self._add(x, self.attn(normed, bias), self.gamma_1, self.norm2)
        return self._add(x, self.mlp(normed), self.gamma_2)[0]

    def _add(
        self, x: Tensor, branch: Tensor, gamma: Tensor | None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The branch added, without those of whole images that drop path drops; and the norm that follows."""
        keep, keep_rate = None, 1 - self.drop_path
        if self.training and self.drop_path > 0:
            dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
            keep = torch.empty(len(x), dtype=dtype, device=x.device).bernoulli_(keep_rate)
        if norm is None:
            return residual_norm(x, branch, gamma, keep, keep_rate)
        return residual_norm(x, branch, gamma, keep, keep_rate, norm.weight, norm.bias, norm.eps)


if TYPE_CHECKING:

    class Blocks(nn.ModuleList):
        def __iter__(self) -> Iterator[Block]: ...


class ViT(nn.Module):
    """Patch embedding, CLS token, positions and blocks, without a final norm or head: its users add theirs."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vit_config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = self.rel_pos_bias = None
        if config.absolute:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.dim))
        if config.shared_table:
            self.rel_pos_bias = RelativePositionBias(config.grid, config.heads, config.attention)
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = cast("Blocks", nn.ModuleList(Block(config, rate) for rate in rates))

    @property
    def grid(self) -> tuple[int, int]:
        return self.vit_config.grid

    def no_weight_decay(self) -> set[str]:
        """The parameters that weight decay spares beside those of one dimension, as the reference's."""
        return {name for name in ("cls_token", "pos_embed") if getattr(self, name) is not None}

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning rates: embeddings 0, block i is i + 1, all else n + 1."""
        if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed."):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else len(self.blocks) + 1

    def embed(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images [B, c, H, W] (and mask [B, N] bool: those patches become the mask token) -> tokens [B, 1 + N, C].

        Raises:
            TypeError: the images are integers.
        """
        require_floating(images)
        x = self.patch_embed(images)
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask[:, :, None], mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def position_bias(self) -> Tensor | None:
        """The relative position bias that all blocks share, computed once per forward."""
        bias: Tensor | None = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return bias

    def run_block(self, block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
        """A block, or in training with ``checkpointing`` the same bits without its activations kept for backward."""
        if self.vit_config.checkpointing and self.training and torch.is_grad_enabled():
            x = checkpoint(block, x, bias, use_reentrant=False)
        else:
            x = block(x, bias)
        return x

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Images -> the last block's tokens [B, 1 + N, C]."""
        x, bias = self.embed(images), self.position_bias()
        for block in self.blocks:
            x = self.run_block(block, x, bias)
        return x


def drop_rates(last: float, count: int) -> list[float]:
    """The drop path of each of ``count`` blocks: from 0 at the first to ``last`` at the last."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def init_weights(model: nn.Module, std: float, *, cut: float = 2.0, convolutions: bool = False) -> None:
    """Truncated normal on [-cut, cut] for linear layers, tokens and positions; zeros for biases.

    Convolutions keep torch's own initial values unless ``convolutions``. Both are as the reference's: its student cuts
    at one std (which leaves 0.54 std of deviation) and has its patch embedding among these, its other models cut at 2.
    """
    kinds = (nn.Linear, nn.Conv2d) if convolutions else nn.Linear
    for module in model.modules():
        if isinstance(module, kinds):
            nn.init.trunc_normal_(module.weight, std=std, a=-cut, b=cut)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "mask_token", "pos_embed")):
            nn.init.trunc_normal_(parameter, std=std, a=-cut, b=cut)


def rescale_outputs(block: Block, layer: int) -> None:
    """Divide the output projections of layer ``layer`` (counted from 1) by sqrt(2 layer), as BEiT does."""
    with torch.no_grad():
        block.attn.proj.weight.div_((2.0 * layer) ** 0.5)
        block.mlp.fc2.weight.div_((2.0 * layer) ** 0.5)


def convert_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Linear layers and convolutions of a frozen network to the dtype of the autocast that it runs under, once.

    Autocast itself would convert frozen weights again in every forward. The results are the same bits.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
        elif isinstance(module, Attention):
            for bias in (module.q_bias, module.v_bias):
                bias.data = bias.data.to(dtype)


def normalize(image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """(image - mean) / std by channel: [..., 3 or 1, H, W] in [0, 1] -> [..., 3, H, W]. TypeError: integers."""
    require_floating(image)
    statistics = torch.tensor((mean, std), dtype=image.dtype).view(2, 3, 1, 1)
    mean_, std_ = statistics.to(image.device, non_blocking=True)  # image.new_tensor would wait for a GPU
    normalized: Tensor = (image - mean_).div_(std_)  # in place: a batch's memory is dear where it is fresh
    return normalized


def require_floating(images: Tensor) -> None:
    """TypeError if images are integers: the arithmetic that follows would give wrong numbers.

    Their range is not checked: on a GPU that would have to wait for them.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"the images are {str(images.dtype).removeprefix('torch.')}, but floating-point numbers are needed. For "
            "pixels from 0 to 255 pass images.float() / 255, in [0, 1]."
        )
