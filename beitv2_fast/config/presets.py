"""Presets: configs by name. base and large hold the numbers of arXiv 2208.06366 (appendix), demo fits a laptop."""

from __future__ import annotations

from dataclasses import replace

from ..models.vit import SIZES
from .downstream import EvaluateConfig, FinetuneConfig, ProbeConfig, TokenizerQualityConfig
from .show import ReportConfig
from .training import PretrainConfig, TokenizerConfig

_TOKENIZER = TokenizerConfig(
    epochs=100, batch_size=64, lr=5e-5, lr_batch=128, min_lr=1e-5, warmup_epochs=10, weight_decay=1e-4,
    betas=(0.9, 0.99), clip_grad=0.0, teacher="clip",
)  # fmt: skip

TOKENIZER = {
    # batch 512 on 8 GPUs
    "base": _TOKENIZER,
    # the published tokenizers: of 3 decoder blocks ("base"), and of 1, taught by CLIP or DINO
    "base_1_block": replace(_TOKENIZER, decoder_depth=1),
    "base_1_block_dino": replace(_TOKENIZER, decoder_depth=1, teacher="dino"),
    # the paper trains ViT-L on the same B/16 tokenizer
    "large": _TOKENIZER,
    "demo": replace(
        _TOKENIZER,
        image_size=128, teacher="efficientnet_lite0@10", teacher_image_size=224, teacher_resize=True, views=1,
        dim=128, depth=4, heads=2, init_std=0.1, decoder_depth=1, num_codes=256, decay=0.97, epochs=8, batch_size=32,
        lr=7e-4, lr_batch=32, warmup_epochs=1, crop_scale=(1.0, 1.0), clip_grad=3.0,
        in_memory=True, workers=0, log_every=20, save_every_minutes=1.0,
    ),
}  # fmt: skip

_PRETRAIN = PretrainConfig(
    epochs=300, batch_size=256, lr=1.5e-3, lr_batch=2048, min_lr=1e-5, warmup_epochs=10, weight_decay=0.05,
    betas=(0.9, 0.98), clip_grad=3.0, drop_path=0.0, layer_scale=0.1,
)  # fmt: skip

_LARGE = replace(_PRETRAIN, **SIZES["large"], early_layer=21, layer_scale=1e-5, batch_size=64)

PRETRAIN = {
    # batch 2048 on 8 GPUs
    "base": _PRETRAIN,
    "base_1600": replace(_PRETRAIN, epochs=1600, betas=(0.9, 0.999), drop_path=0.1),
    # batch 2048 on 32 GPUs
    "large": _LARGE,
    "large_1600": replace(_LARGE, epochs=1600, betas=(0.9, 0.999), drop_path=0.1),
    # not in the paper: its recipes, for ViT-S/16 and ViT-H/14 (whose 16 x 16 patches a /16 tokenizer has at 256 pixels)
    "small": replace(_PRETRAIN, **SIZES["small"]),
    "huge": replace(_LARGE, **SIZES["huge"], early_layer=28, batch_size=32, num_masked=98, tokenizer_image_size=256),
    "demo": replace(
        _PRETRAIN,
        image_size=128, dim=128, depth=6, heads=2, position="absolute_shared_relative", init_std=0.16, layer_scale=0.0,
        early_layer=4, num_masked=26, min_mask_patches=4, epochs=12, batch_size=32, lr=1e-3, lr_batch=32,
        warmup_epochs=2, crop_scale=(1.0, 1.0), color_jitter=0.0, in_memory=True, workers=0, log_every=20,
        save_every_minutes=1.0,
    ),
}  # fmt: skip

PROBE = {
    "base": ProbeConfig(),
    "large": ProbeConfig(),
    "demo": ProbeConfig(exact=True),
}  # fmt: skip

# The numbers of the appendix; warm-up, min_lr and those after an intermediate fine-tuning: the reference's commands
# (beit2/get_started_for_image_classification.md and the defaults of its run_class_finetuning.py).
_FINETUNE = FinetuneConfig(
    epochs=100, batch_size=128, lr=5e-4, lr_batch=1024, min_lr=1e-6, warmup_epochs=20, weight_decay=0.05,
    betas=(0.9, 0.999), clip_grad=0.0, drop_path=0.1, layer_decay=0.65, augment_policy="rand-m9-mstd0.5-inc1",
    ema_decay=0.0,
)  # fmt: skip

_FINETUNE_LARGE = replace(
    _FINETUNE, **SIZES["large"], epochs=50, warmup_epochs=5, layer_decay=0.8, drop_path=0.2, batch_size=32,
    layer_scale=1e-5,
)  # fmt: skip

# On ImageNet-21k, batch 4096 on 32 GPUs: another label set, without evaluation unless there is a folder val or --val
_INTERMEDIATE = replace(_FINETUNE, epochs=90, lr=6e-4, lr_batch=4096, layer_decay=0.75)

_LARGE_AFTER = replace(_FINETUNE_LARGE, epochs=20, lr=7e-5, drop_path=0.25, mixup=0.0, cutmix=0.0)

FINETUNE = {
    # after 300 epochs of pre-training; batch 1024 on 8 GPUs
    "base": _FINETUNE,
    "base_1600": replace(_FINETUNE, layer_decay=0.6, drop_path=0.2),
    # batch 1024 on 32 GPUs
    "large": replace(_FINETUNE_LARGE, lr=5e-4),
    "large_1600": replace(_FINETUNE_LARGE, lr=2e-4),
    "base_intermediate": _INTERMEDIATE,
    "large_intermediate": replace(_INTERMEDIATE, **SIZES["large"], drop_path=0.2, layer_scale=1e-5),
    "base_after_intermediate": replace(
        _FINETUNE, epochs=30, lr=5e-5, layer_decay=0.75, mixup=0.0, cutmix=0.0,
    ),
    "large_after_intermediate": _LARGE_AFTER,
    # at 384 pixels; the paper has its score, and no command for it is published: that of 224 pixels
    "large_384_after_intermediate": replace(_LARGE_AFTER, image_size=384, batch_size=8, accumulate=4),
    "demo": replace(
        _FINETUNE,
        image_size=128,
        dim=128, depth=6, heads=2, init_std=0.1, layer_scale=0.0, drop_path=0.0, epochs=10, batch_size=32, lr=5e-4,
        lr_batch=32, warmup_epochs=1, crop_scale=(0.5, 1.0), crop_pct=1.0, augment_policy="none", ema_decay=0.99,
        in_memory=True, workers=0, log_every=20, save_every_minutes=1.0,
    ),
}  # fmt: skip

EVALUATE = {
    "base": EvaluateConfig(),
    "demo": EvaluateConfig(crop_pct=1.0),
}  # fmt: skip

REPORT = {"base": ReportConfig(), "large": ReportConfig(), "demo": ReportConfig()}


PRESETS = {"base": TokenizerQualityConfig()}
