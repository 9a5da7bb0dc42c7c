"""The segmentation heads: UPerNet (arXiv 1807.10221) and the small FCN that helps it to train.

Their own code, since the kept ones fit worse: segmentation_models_pytorch's decoder puts norms before it that the
reference does not have, and that of transformers is private, without dropout and without the published names. Names of
parameters are those of mmsegmentation, in which the published segmenters are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...distributed import World, in_a_group

POOL_SCALES = (1, 2, 3, 6)
SEGMENT_STD = 0.01  # of the last convolution's initial weights


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm over all ranks, ReLU: [B, c, H, W] -> [B, C, H, W]."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UPerNetHead(nn.Module):
    """Feature maps from fine to coarse [B, c, h_i, w_i] -> logits [B, classes, h_0, w_0].

    The coarsest map is pooled to 1, 2, 3 and 6 cells a side and joined with what comes of it (pyramid pooling), then
    added to the finer ones step by step, upsampled (a feature pyramid); all four together make the logits.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNorm(in_channels[-1], channels)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvNorm(in_channels[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(c, channels) for c in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = ConvNorm(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = last_layer(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        top = maps[-1]
        pooled = [resize(module(top), top.shape[2:]) for module in self.psp_modules]
        levels = [lateral(m) for lateral, m in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        levels[:-1] = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        fused = self.fpn_bottleneck(torch.cat([resize(level, levels[0].shape[2:]) for level in levels], 1))
        return self.conv_seg(self.dropout(fused))


class FCNHead(nn.Module):
    """The auxiliary head: one convolution on one feature map, [B, c, h, w] -> logits [B, classes, h, w]."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = last_layer(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the images of all ranks, with any backend of torch.distributed.

    torch's nn.SyncBatchNorm is only for GPUs; ``across_ranks`` puts it in place there.
    """

    def forward(self, x: Tensor) -> Tensor:
        ranks = dist.get_world_size() if self.training and in_a_group() else 1
        if ranks == 1:
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        count = ranks * x.numel() // x.shape[1]  # every rank has as many images
        x = x.float()
        mean = _SumOverRanks.apply(x.sum((0, 2, 3))) / count
        centered = x - mean.view(1, -1, 1, 1)
        var = _SumOverRanks.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return centered * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def across_ranks(model: nn.Module, world: World) -> nn.Module:
    """The model as several ranks train it: on GPUs with torch's batch norm over ranks, whose kernels are faster."""
    on_gpus = world.size > 1 and world.device.type == "cuda"
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpus else model


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks, and of its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def last_layer(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=SEGMENT_STD)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinearly between pixel centers."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, tuple(size), mode="bilinear")
