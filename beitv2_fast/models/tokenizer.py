"""VQ-KD: the visual tokenizer of BEiT v2, learned from a frozen teacher (arXiv 2208.06366 section 2.2).

image in [0,1] -> encoder -> Linear-Tanh-Linear -> quantizer -> decoder -> Linear-Tanh-Linear -> teacher features
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantize.options import DEAD_AFTER
from ..quantize.quantizer import FusedVectorQuantizer
from .vit import Linear, ViT, ViTConfig, convert_products, init_weights, rescale_outputs


@dataclass(frozen=True)
class TokenizerModelConfig:
    encoder: ViTConfig = ViTConfig(position="absolute")
    decoder_depth: int = 3
    num_codes: int = 8192
    code_dim: int = 32
    teacher_dim: int = 512
    decay: float = 0.99
    commitment_weight: float = 1.0
    kmeans_init: bool = True
    dead_after: float = DEAD_AFTER

    @property
    def decoder(self) -> ViTConfig:
        """A ViT of patch size 1 over the grid of codes, of the encoder's width and heads."""
        return replace(
            self.encoder,
            image_size=self.encoder.grid[0],
            patch_size=1,
            in_channels=self.code_dim,
            depth=self.decoder_depth,
            layer_scale=0.0,
            drop_path=0.0,
        )


class TokenizerOutput(NamedTuple):
    """loss = rec_loss + commit_loss; indices [B, N] int64; reconstruction [B, N, teacher_dim]."""

    loss: Tensor
    rec_loss: Tensor
    commit_loss: Tensor
    indices: Tensor
    reconstruction: Tensor


class PatchViT(ViT):
    """A ViT that returns its normalized patch tokens: [B, c, H, W] -> [B, N, C]."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.dim, config.eps)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.fc_norm(self.forward_tokens(images)[:, 1:])
        return patches


class FullPrecisionLinear(nn.Linear):
    """``nn.Linear`` in fp32, or fp64 for fp64 inputs, whatever autocast and the dtype of its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Tokenizer(nn.Module):
    """VQ-KD. ``forward`` is the training loss; ``encode`` turns images into codes."""

    dtype: torch.dtype | None = None  # of the autocast of ``encode``; None: whatever is around the call

    def __init__(self, config: TokenizerModelConfig):
        super().__init__()
        self.config = config
        dim = config.encoder.dim
        self.encoder = PatchViT(config.encoder)
        self.encode_task_layer = nn.Sequential(
            FullPrecisionLinear(dim, dim), nn.Tanh(), FullPrecisionLinear(dim, config.code_dim)
        )
        self.quantize = FusedVectorQuantizer(
            config.num_codes,
            config.code_dim,
            decay=config.decay,
            commitment_weight=config.commitment_weight,
            kmeans_init=config.kmeans_init,
            dead_after=config.dead_after,
        )
        self.decoder = PatchViT(config.decoder)
        self.decode_task_layer = nn.Sequential(Linear(dim, dim), nn.Tanh(), Linear(dim, config.teacher_dim))
        init_weights(self, config.encoder.init_std)
        for vit in (self.encoder, self.decoder):
            for i, block in enumerate(vit.blocks):
                rescale_outputs(block, i + 1)

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.grid

    @property
    def patch_size(self) -> int:
        return self.config.encoder.patch_size

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> the vectors h_i before quantization, [B, N, code_dim].

        They are fp32, whatever autocast or ``tokenizer.half()`` says (fp64 after ``tokenizer.double()``).
        """
        vectors: Tensor = self.encode_task_layer(self.encoder(2 * images - 1))
        return vectors

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> codes [B, N] int64. The codebook stays as it is."""
        with nullcontext() if self.dtype is None else torch.autocast(images.device.type, self.dtype):
            return self.quantize.encode(self.features(images))

    def frozen(self, dtype: torch.dtype | None = None) -> Tokenizer:
        """In eval mode, without gradients. With a dtype: ``encode`` under autocast to it (``convert_products``)."""
        self.dtype = dtype
        if dtype is not None:
            convert_products(self.encoder, dtype)
        return self.eval().requires_grad_(False)

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantized vectors [B, N, code_dim] -> reconstructed teacher features [B, N, teacher_dim]."""
        grid = quantized.transpose(1, 2).unflatten(2, self.grid)  # [B, D, h, w]
        features: Tensor = self.decode_task_layer(self.decoder(grid))
        return features

    @torch.no_grad()
    def similarity(self, images: Tensor, teacher_features: Tensor) -> Tensor:
        """Cosine between the teacher's features and what the decoder rebuilds from the codes, per patch: [B, N] fp32.

        Args:
            images: [B, 3, H, W] in [0, 1].
            teacher_features: [B, N, teacher_dim].
        """
        decoded = self.decode(self.quantize.codebook[self.encode(images)])
        return F.cosine_similarity(decoded.float(), teacher_features.float(), dim=-1)

    def forward(self, images: Tensor, teacher_features: Tensor) -> TokenizerOutput:
        """The VQ-KD loss (eq. 3): mean(1 - cos(o_i, t_i)) + beta * mean((sg[z_q] - l2(h))^2).

        In training mode the codebook takes its EMA step.

        Args:
            images: [B, 3, H, W] in [0, 1].
            teacher_features: [B, N, teacher_dim].
        """
        expected = (images.shape[0], self.grid[0] * self.grid[1], self.config.teacher_dim)
        if teacher_features.shape != expected:
            raise ValueError(f"teacher features must be {list(expected)}; got {list(teacher_features.shape)}")
        codes = self.quantize(self.features(images))
        reconstruction = self.decode(codes.quantized)
        rec_loss = (1 - F.cosine_similarity(reconstruction.float(), teacher_features.float(), dim=-1)).mean()
        return TokenizerOutput(rec_loss + codes.loss, rec_loss, codes.loss, codes.indices, reconstruction)
