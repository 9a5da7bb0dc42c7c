"""The segmenter against transformers' BEiT segmenter and UPerNet with copied weights, and its parts by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beitv2_fast.distributed import World
from beitv2_fast.downstream.segmentation.head import FCNHead, UPerNetHead, across_ranks
from beitv2_fast.downstream.segmentation.model import Segmenter, SegmenterConfig, pyramid_layers
from beitv2_fast.errors import CheckpointError
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.training.optim import parameter_groups
from beitv2_fast.weights.start import start_from

from ..support.weights import DIM, assert_same_state, classifier, images, randomize, student, vit

TOLERANCE = dict(rtol=1e-4, atol=1e-5)
CLASSES = 5


def segmenter(num_classes: int = CLASSES, patch_size: int = 16, **values) -> Segmenter:
    config = ViTConfig(**{**vars(vit("relative")), "patch_size": patch_size, **values})
    return positive_variances(randomize(Segmenter(SegmenterConfig(config, num_classes, auxiliary_channels=12))))


def positive_variances(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.abs_().add_(0.1)
            module.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    return model


def copy_head(theirs: nn.Module, ours: nn.Module) -> None:
    """By order: both heads are built of the same parts, if these are put in the same order."""
    order = ("psp_modules", "bottleneck", "lateral_convs", "fpn_convs", "fpn_bottleneck", "convs", "conv_seg")
    names = {"bottleneck": ("bottleneck", "psp_bottleneck"), "conv_seg": ("classifier",)}
    with torch.no_grad():
        for part in order:
            if not hasattr(ours, part):
                continue
            other = next(getattr(theirs, n) for n in names.get(part, (part,)) if hasattr(theirs, n))
            mine, yours = getattr(ours, part).state_dict().values(), other.state_dict().values()
            for a, b in zip(mine, yours, strict=True):
                b.copy_(a)


def feature_maps(channels: int = DIM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, channels, side, side, generator=generator) for side in (24, 12, 6, 3)]


@torch.no_grad()
def test_the_heads_are_those_of_transformers_upernet():
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    config = upernet.UperNetConfig(
        hidden_size=20, pool_scales=[1, 2, 3, 6], num_labels=CLASSES, auxiliary_in_channels=DIM, auxiliary_channels=12
    )
    ours, theirs = UPerNetHead([DIM] * 4, 20, CLASSES), upernet.UperNetHead(config, [DIM] * 4).eval()
    auxiliary, their_auxiliary = FCNHead(DIM, 12, CLASSES), upernet.UperNetFCNHead(config, [DIM] * 4).eval()
    for mine, yours in ((ours, theirs), (auxiliary, their_auxiliary)):
        positive_variances(randomize(mine))
        copy_head(yours, mine)
    maps = feature_maps()
    torch.testing.assert_close(ours(maps), theirs(maps), **TOLERANCE)
    torch.testing.assert_close(auxiliary(maps[2]), their_auxiliary(maps), **TOLERANCE)


@torch.no_grad()
def test_the_pyramid_and_the_logits_are_those_of_transformers_beit():
    transformers = pytest.importorskip("transformers")
    ours = segmenter()
    config = transformers.BeitConfig(
        hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4, intermediate_size=4 * DIM, image_size=48,
        patch_size=16, layer_norm_eps=1e-6, use_relative_position_bias=True, use_absolute_position_embeddings=False,
        out_indices=[0, 1, 2, 3], num_labels=CLASSES, auxiliary_channels=12,
    )  # fmt: skip
    theirs = transformers.BeitForSemanticSegmentation(config).eval()
    for own, other in ((ours.fpn1, theirs.fpn.fpn1), (ours.fpn2, theirs.fpn.fpn2)):
        for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True):
            b.copy_(a)
    copy_head(theirs.decode_head, ours.decode_head)
    x, found, tokens = images(), [], ours.embed(images())
    for block in ours.blocks:
        tokens = block(tokens)
        found.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 3)))
    wanted = theirs.fpn([found[layer] for layer in ours.layers])
    for mine, yours in zip(ours.forward_maps(x), wanted, strict=True):
        torch.testing.assert_close(mine, yours, **TOLERANCE)
    copy_head(theirs.auxiliary_head, ours.auxiliary_head)
    for mine, yours in zip(ours(x), (theirs.decode_head(wanted), theirs.auxiliary_head(wanted)), strict=True):
        torch.testing.assert_close(mine, yours, **TOLERANCE)


LAYERS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23), 8: (1, 3, 5, 7), 6: (1, 2, 3, 5), 4: (0, 1, 2, 3)}
LAYERS |= {2: (0, 0, 1, 1), 1: (0, 0, 0, 0)}


@pytest.mark.parametrize(("depth", "layers"), LAYERS.items())
def test_the_pyramid_reads_the_published_layers_or_evenly_spread_ones(depth, layers):
    assert pyramid_layers(depth) == layers
    assert SegmenterConfig(ViTConfig(depth=depth)).layers == ()


@pytest.mark.parametrize("layers", [(3, 5, 7), (3, 5, 7, 10), (7, 5, 3, 11), (3, 5, 7, 12)])
def test_layers_that_make_no_pyramid_are_refused(layers):
    with pytest.raises(ValueError, match="four layers in order"):
        SegmenterConfig(ViTConfig(), layers=layers)


@pytest.mark.parametrize("patch_size", (8, 16))
def test_the_logits_have_strides_of_4_and_16_pixels(patch_size):
    model = segmenter(patch_size=patch_size, image_size=64)
    assert [m.shape[-1] for m in model.forward_maps(images(2, 64))] == [16, 8, 4, 2]
    logits, auxiliary = model(images(2, 64))
    assert logits.shape == (2, CLASSES, 16, 16) and auxiliary.shape == (2, CLASSES, 4, 4)


def test_every_parameter_gets_a_gradient():
    model = segmenter().train()
    logits, auxiliary = model(images())
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_blocks_learn_by_layer_decay_and_the_heads_at_the_full_rate():
    groups = parameter_groups(segmenter(), 0.05, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["patch_embed.proj.weight"] == 0.5**4 and scales["blocks.2.mlp.fc1.weight"] == 0.5
    heads = [name for name in scales if name.startswith(("fpn", "decode_head.", "auxiliary_head."))]
    assert len(heads) > 40 and {scales[name] for name in heads} == {1.0}
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert "decode_head.conv_seg.weight" in decayed and "decode_head.bottleneck.bn.weight" not in decayed


@pytest.mark.parametrize("start", (student, classifier))
def test_a_backbone_is_loaded_whole_with_positions_of_the_new_size(start):
    state = start().state_dict()
    model = segmenter(image_size=64)
    new = start_from(model, state, "here")
    assert {name.split(".")[0] for name in new} == {"fpn1", "fpn2", "decode_head", "auxiliary_head"}
    assert torch.equal(model.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert len(model.blocks[0].attn.relative_position_bias_table) == 7 * 7 + 3


def test_another_segmenters_heads_are_kept_but_for_last_layers_of_other_classes():
    state = segmenter().state_dict()
    assert start_from(segmenter(), state, "here") == []
    model = segmenter(num_classes=9)
    new = start_from(model, state, "here")
    assert {name.rpartition(".")[0] for name in new} == {"decode_head.conv_seg", "auxiliary_head.conv_seg"}
    assert torch.equal(model.decode_head.bottleneck.conv.weight, state["decode_head.bottleneck.conv.weight"])


def test_a_backbone_with_missing_weights_is_refused():
    state = student().state_dict()
    del state["blocks.1.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.norm1\.weight"):
        start_from(segmenter(), state, "here")


def test_on_several_gpus_torchs_own_batch_norm_takes_the_same_weights():
    model, wanted = segmenter(), segmenter().state_dict()
    assert across_ranks(model, World(0, 2, torch.device("cpu"))) is model
    converted = across_ranks(model, World(0, 2, torch.device("cuda")))
    kinds = {type(module) for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert_same_state(converted.state_dict(), wanted)
