"""The two trainings' models written as the reference implementation is structured, to measure ours beside it.

Every layer's scores, probabilities and GELU inputs are tensors of their own; the quantizer builds the N x K matrices of
distances and of zeros and ones; the student's head builds all logits of both branches. Parameters have the names of
``beitv2_fast``, so both start from the same weights (``same_weights``) and must give the same loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast.models.attention import relative_position_index
from beitv2_fast.models.student import StudentConfig
from beitv2_fast.models.tokenizer import TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from bench.test_codebook_update import one_hot_update

OURS_ALONE = {"initialized", "idle", "steps", "recent"}  # state of our quantizer that the reference's does not have


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads, self.scale = config.heads, (config.dim // config.heads) ** -0.5
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(config.dim)), nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        B, N, C = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]))
        q, k, v = qkv.reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim, config.eps), nn.LayerNorm(config.dim, config.eps)
        self.attn, self.mlp = Attention(config), MLP(config.dim, int(config.dim * config.mlp_ratio))
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        attended = self.attn(self.norm1(x), bias)
        x = x + (attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if self.gamma_2 is None else self.gamma_2 * mixed)


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class RelativePositionBias(nn.Module):
    """Gathered from the table once a forward, as the reference does where the layers share it."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        h, w = config.grid
        table = torch.zeros((2 * h - 1) * (2 * w - 1) + 3, config.heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("relative_position_index", relative_position_index(config.grid), persistent=False)

    def forward(self) -> Tensor:
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1)
        return bias.permute(2, 0, 1).contiguous()


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.position == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.dim))
        else:
            self.rel_pos_bias = RelativePositionBias(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))


class PatchViT(ViT):
    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.dim, config.eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, None)
        return self.fc_norm(x[:, 1:])


class OneHotQuantizer(nn.Module):
    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.register_buffer("codebook", torch.zeros(num_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))

    def nearest(self, rows: Tensor) -> Tensor:
        distances = rows.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * rows @ self.codebook.T
        return distances.argmin(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = F.normalize(z, dim=-1)
        rows = y.flatten(0, -2)
        indices = self.nearest(rows)
        codes = F.embedding(indices, self.codebook).view_as(y)
        with torch.no_grad():
            one_hot_update(self.codebook, self.cluster_size, rows, indices)
        return y + (codes - y).detach(), F.mse_loss(codes.detach(), y)


class Tokenizer(nn.Module):
    """VQ-KD; ``forward`` gives the loss."""

    def __init__(self, config: TokenizerModelConfig):
        super().__init__()
        dim = config.encoder.dim
        self.encoder, self.decoder = PatchViT(config.encoder), PatchViT(config.decoder)
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.code_dim))
        self.decode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.teacher_dim))
        self.quantize = OneHotQuantizer(config.num_codes, config.code_dim)
        self.grid = config.encoder.grid

    def vectors(self, images: Tensor) -> Tensor:
        x = self.encoder(2 * images - 1)
        with torch.autocast(x.device.type, enabled=False):
            return self.encode_task_layer(x.float())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, N]."""
        z = F.normalize(self.vectors(images), dim=-1)
        return self.quantize.nearest(z.flatten(0, -2)).view(z.shape[:-1])

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        z = self.vectors(images)
        with torch.autocast(z.device.type, enabled=False):
            quantized, commitment = self.quantize(z)
        out = self.decode_task_layer(self.decoder(quantized.transpose(1, 2).unflatten(2, self.grid)))
        out, target = F.normalize(out.float(), dim=-1), F.normalize(target, dim=-1)
        return (1 - (out * target).sum(-1)).mean() + commitment


class Student(ViT):
    """Masked image modeling with patch aggregation and a shared head; ``forward`` gives the loss."""

    def __init__(self, config: StudentConfig):
        super().__init__(config.vit)
        dim = config.vit.dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm, self.lm_head = nn.LayerNorm(dim, config.vit.eps), nn.Linear(dim, config.num_codes)
        self.cls_pt_layers = nn.ModuleList(Block(config.vit) for _ in range(config.aggregation_depth))
        self.early_layer = config.early_layer

    def forward(self, images: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        x = self.patch_embed(images)
        hidden = mask.unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - hidden) + self.mask_token * hidden
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        bias = self.rel_pos_bias()
        for i, block in enumerate(self.blocks):
            x = block(x, bias)
            if i + 1 == self.early_layer:
                early = x[:, 1:]
        aggregated = torch.cat([x[:, :1], early], dim=1)
        for block in self.cls_pt_layers:
            aggregated = block(aggregated, bias)
        logits = [self.lm_head(self.norm(branch)[:, 1:][mask]) for branch in (x, aggregated)]
        self.correct = [(each.argmax(-1) == labels).sum() for each in logits]
        return sum(F.cross_entropy(each, labels) for each in logits)


def same_weights(reference: nn.Module, ours: nn.Module) -> nn.Module:
    """Load our weights and codebook into the reference's structure; names must agree."""
    missing, unexpected = reference.load_state_dict(ours.state_dict(), strict=False)
    extra = [name for name in unexpected if name.rpartition(".")[2] not in OURS_ALONE]
    if missing or extra:
        raise ValueError(f"the structures differ: missing {missing}, unexpected {extra}")
    return reference
