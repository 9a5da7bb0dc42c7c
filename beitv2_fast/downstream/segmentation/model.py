"""The segmenter: a ViT, a feature pyramid of four of its layers, and UPerNet on it (arXiv 2208.06366 section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...models.vit import ViT, ViTConfig, init_weights, rescale_outputs
from .head import BatchNorm, FCNHead, UPerNetHead

PUBLISHED_LAYERS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}  # depth -> the reference's
AUXILIARY_LEVEL = 2  # of the pyramid: the map at the patches' own size


def pyramid_layers(depth: int) -> tuple[int, ...]:
    """The four blocks, counted from 0, that the pyramid reads: the reference's, or evenly spread ones."""
    return PUBLISHED_LAYERS.get(depth) or tuple(max(round(depth * i / 4), 1) - 1 for i in (1, 2, 3, 4))


@dataclass(frozen=True)
class SegmenterConfig:
    """layers: four blocks, counted from 0; () for ``pyramid_layers``. channels: of UPerNet; 0: the ViT's width."""

    vit: ViTConfig = ViTConfig(image_size=512, position="relative", layer_scale=0.1, drop_path=0.15)
    num_classes: int = 150
    layers: tuple[int, ...] = ()
    channels: int = 0
    auxiliary_channels: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        layers = self.layers or pyramid_layers(self.vit.depth)
        if len(layers) != 4 or list(layers) != sorted(layers) or layers[0] < 0 or layers[-1] != self.vit.depth - 1:
            raise ValueError(
                f"the pyramid reads four layers in order, counted from 0, of which the last is the ViT's last, "
                f"{self.vit.depth - 1}; got {' '.join(map(str, layers))}"
            )


class Segmenter(ViT):
    """Images [B, 3, S, S], normalized -> logits [B, classes, S/4, S/4] (with patches of 16 or 8 pixels), and those of
    the auxiliary head, [B, classes, S/16, S/16].

    The latter in evaluation too, where they are not needed and cost half a percent: ZeRO 3 fetches weights ahead in
    the order of the training's forward, and those that were not used then could not be saved.
    """

    def __init__(self, config: SegmenterConfig):
        super().__init__(config.vit)
        self.config = config
        self.layers = config.layers or pyramid_layers(config.vit.depth)
        init_weights(self, config.vit.init_std)  # of the ViT only: the heads bring their own
        for i, block in enumerate(self.blocks):
            rescale_outputs(block, i + 1)
        dim = config.vit.dim
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = pyramid(dim, config.vit.patch_size)
        self.decode_head = UPerNetHead([dim] * 4, config.channels or dim, config.num_classes, config.dropout)
        self.auxiliary_head = FCNHead(dim, config.auxiliary_channels, config.num_classes, config.dropout)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Images -> the pyramid, from fine to coarse: strides of 4, 8, 16 and 32 pixels."""
        x, bias = self.embed(images), self.position_bias()
        maps = []
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, bias)
            found = x[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # [B, N, C] -> [B, C, h, w]
            maps += [found] * self.layers.count(i)
        scale = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [module(found) for module, found in zip(scale, maps, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.forward_maps(images)
        return self.decode_head(maps), self.auxiliary_head(maps[AUXILIARY_LEVEL])


def pyramid(dim: int, patch_size: int) -> list[nn.Module]:
    """What brings four maps of the patches' size to 4, 2, 1 and 1/2 times it, or with patches of 8 to 2, 1, 1/2, 1/4.

    As the reference's (BEiT's segmentation backbone): transposed convolutions upwards, max pooling downwards.
    """
    twice = nn.ConvTranspose2d(dim, dim, 2, 2)
    if patch_size == 8:
        return [nn.Sequential(twice), nn.Identity(), nn.Sequential(nn.MaxPool2d(2)), nn.Sequential(nn.MaxPool2d(4))]
    four_times = nn.Sequential(twice, BatchNorm(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2))
    return [four_times, nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2)), nn.Identity(), nn.MaxPool2d(2)]
