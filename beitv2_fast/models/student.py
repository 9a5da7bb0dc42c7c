"""The masked-image student of BEiT v2, with patch aggregation (arXiv 2208.06366 sections 2.3 and 2.4).

student view + mask -> blocks -> masked tokens ------------------------> head -> loss_mim
                          \\-> [CLS of the last; patches of layer l] -> 2 blocks -> head -> loss_agg
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import masked_cross_entropy
from .vit import Block, ViT, ViTConfig, drop_rates, init_weights, rescale_outputs

if TYPE_CHECKING:
    from .vit import Blocks


@dataclass(frozen=True)
class StudentConfig:
    vit: ViTConfig = ViTConfig(layer_scale=0.1)
    num_codes: int = 8192
    early_layer: int = 9  # l: the aggregation branch reads the patches of this layer (counted from 1)
    aggregation_depth: int = 2  # 0: no patch aggregation (the objective of BEiT v1)
    shared_head: bool = True

    def __post_init__(self) -> None:
        if self.aggregation_depth and not 1 <= self.early_layer <= self.vit.depth:
            raise ValueError(f"early_layer must lie in 1..{self.vit.depth}; got {self.early_layer}")


class StudentOutput(NamedTuple):
    """loss: the sum of losses [branches]; correct [branches]: masked tokens whose code was predicted."""

    loss: Tensor
    losses: Tensor
    correct: Tensor


class Student(ViT):
    """ViT that predicts the code of every masked patch, from its last layer and from the aggregation branch."""

    def __init__(self, config: StudentConfig):
        super().__init__(config.vit)
        self.config, vit = config, config.vit
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.dim))
        self.norm = nn.LayerNorm(vit.dim, vit.eps)
        self.lm_head = nn.Linear(vit.dim, config.num_codes)
        init_weights(self, vit.init_std, cut=vit.init_std, convolutions=True)
        for i, block in enumerate(self.blocks):
            rescale_outputs(block, i + 1)
        if config.aggregation_depth:
            self._add_aggregation()

    def _add_aggregation(self) -> None:
        """Blocks l .. l + depth - 1 of a longer network, with torch's own initial weights, as the reference's."""
        config, vit = self.config, self.config.vit
        last = config.early_layer + config.aggregation_depth
        rates = drop_rates(vit.drop_path, max(vit.depth, last))[config.early_layer : last]
        self.cls_pt_layers = cast("Blocks", nn.ModuleList(Block(vit, rate) for rate in rates))
        for i, block in enumerate(self.cls_pt_layers):
            rescale_outputs(block, config.early_layer + i + 1)
        if not config.shared_head:
            self.cls_pt_norm = nn.LayerNorm(vit.dim, vit.eps)
            self.cls_pt_lm_head = nn.Linear(vit.dim, config.num_codes)
            init_weights(self.cls_pt_lm_head, vit.init_std, cut=vit.init_std)

    @property
    def aggregation_head(self) -> tuple[nn.LayerNorm, nn.Linear]:
        """Norm and head of the aggregation branch: the last layer's own, unless they are separate."""
        separate = self.config.aggregation_depth and not self.config.shared_head
        return (self.cls_pt_norm, self.cls_pt_lm_head) if separate else (self.norm, self.lm_head)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens before the final norm: of the last layer, and of the aggregation branch (None without one).

        Args:
            images: [B, 3, H, W], normalized with ImageNet's mean and standard deviation.
            mask: [B, N] bool or None.

        Returns:
            two [B, 1 + N, C].
        """
        x, bias = self.embed(images, mask, self.mask_token), self.position_bias()
        early = x
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, bias)
            if i + 1 == self.config.early_layer:
                early = x
        if not self.config.aggregation_depth:
            return x, None
        aggregated = torch.cat([x[:, :1], early[:, 1:]], dim=1)
        for block in self.cls_pt_layers:
            aggregated = self.run_block(block, aggregated, bias)
        return x, aggregated

    def forward(self, images: Tensor, mask: Tensor, labels: Tensor, num_masked: int | None = None) -> StudentOutput:
        """The masked-image-modeling loss (eq. 5, plus the same on the aggregation branch).

        Args:
            images: [B, 3, H, W].
            mask: [B, N] bool.
            labels: [M] int64 codes of the masked patches, row-major.
            num_masked: masked patches of each image, if the same for all (see ``masked_gather``).
        """
        branches = [tokens for tokens in self.encode(images, mask) if tokens is not None]
        mask = F.pad(mask, (1, 0))  # of all tokens: a slice of these would have its gradient copied
        if self.config.shared_head:
            losses, correct = self._head(branches, mask, labels, num_masked, self.norm, self.lm_head)
        else:
            heads = [(self.norm, self.lm_head), self.aggregation_head]
            parts = [
                self._head([tokens], mask, labels, num_masked, norm, head)
                for tokens, (norm, head) in zip(branches, heads, strict=False)
            ]
            losses, correct = (torch.cat(values) for values in zip(*parts, strict=True))
        return StudentOutput(losses.sum(), losses, correct)

    @staticmethod
    def _head(
        branches: list[Tensor],
        mask: Tensor,
        labels: Tensor,
        num_masked: int | None,
        norm: nn.LayerNorm,
        head: nn.Linear,
    ) -> tuple[Tensor, Tensor]:
        return masked_cross_entropy(
            branches,
            mask,
            labels,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            weight=head.weight,
            bias=head.bias,
            num_masked=num_masked,
        )

    def predict(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Logits [B, N, num_codes] of every patch, for each branch: for pictures and tests, not for training."""
        last, aggregated = self.encode(images, mask)
        logits = [self.lm_head(self.norm(last[:, 1:]))]
        if aggregated is not None:
            norm, head = self.aggregation_head
            logits.append(head(norm(aggregated[:, 1:])))
        return logits


BRANCHES = ("last layer", "aggregation branch")
