"""The fine-tuning model: ViT, mean of the patch tokens, LayerNorm, linear (arXiv 2208.06366 section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .vit import ViT, ViTConfig, init_weights, rescale_outputs


@dataclass(frozen=True)
class ClassifierConfig:
    vit: ViTConfig = ViTConfig(position="relative", layer_scale=0.1, drop_path=0.1)
    num_classes: int = 1000


class Classifier(ViT):
    """Images [B, 3, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: ClassifierConfig):
        super().__init__(config.vit)
        self.config = config
        self.fc_norm = nn.LayerNorm(config.vit.dim, config.vit.eps)
        self.head = nn.Linear(config.vit.dim, config.num_classes)
        init_weights(self, config.vit.init_std)
        for i, block in enumerate(self.blocks):
            rescale_outputs(block, i + 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc_norm(self.forward_tokens(images)[:, 1:].mean(1)))
        return logits
