"""Segmenters as the reference publishes them, in mmsegmentation's layout: all values arrive, and they are evaluated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beitv2_fast import create_model
from beitv2_fast.config.downstream import FinetuneConfig, SegmentConfig
from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.distributed import World
from beitv2_fast.downstream.classification import start_model
from beitv2_fast.downstream.segmentation.evaluation import Slide, evaluate_segmenter
from beitv2_fast.downstream.segmentation.masks import find_masks, label_table
from beitv2_fast.downstream.segmentation.training import start_segmenter
from beitv2_fast.downstream.segmentation.views import SegmentationFolder
from beitv2_fast.errors import CheckpointError
from beitv2_fast.models.attention import relative_position_index
from beitv2_fast.weights import convert
from beitv2_fast.weights.files import read, write
from beitv2_fast.weights.names import SEGMENTER_HEADS

from ..support.downstream import SMALL, results, write_scenes
from ..support.release_server import serving
from ..support.training import call
from ..support.weights import assert_same_state

DIM, DEPTH, HEADS, GRID, PATCH, CLASSES = 24, 4, 2, 2, 16, 3
SHAPE = {"dim": DIM, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "image_size": GRID * PATCH}


def published_state(classes: int = CLASSES) -> dict[str, Tensor]:
    """An EncoderDecoder of mmsegmentation with the reference's BEiT, UPerHead and FCNHead, random in every entry."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.cls_token": (1, 1, DIM)}
    shapes |= {"backbone.patch_embed.proj.weight": (DIM, 3, PATCH, PATCH), "backbone.patch_embed.proj.bias": (DIM,)}
    for i in range(DEPTH):
        block = f"backbone.blocks.{i}"
        shapes |= {f"{block}.{name}": (DIM,) for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        shapes |= {f"{block}.norm{n}.{leaf}": (DIM,) for n in (1, 2) for leaf in ("weight", "bias")}
        shapes |= {f"{block}.attn.relative_position_bias_table": ((2 * GRID - 1) ** 2 + 3, HEADS)}
        shapes |= {f"{block}.attn.qkv.weight": (3 * DIM, DIM), f"{block}.attn.proj.weight": (DIM, DIM)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * DIM, DIM), f"{block}.mlp.fc1.bias": (4 * DIM,)}
        shapes |= {f"{block}.mlp.fc2.weight": (DIM, 4 * DIM), f"{block}.mlp.fc2.bias": (DIM,)}
        shapes |= {f"{block}.attn.proj.bias": (DIM,)}
    for up in ("fpn1.0", "fpn1.3", "fpn2.0"):
        shapes |= {f"backbone.{up}.weight": (DIM, DIM, 2, 2), f"backbone.{up}.bias": (DIM,)}
    norms = {"backbone.fpn1.1": DIM}
    convolutions = {f"decode_head.psp_modules.{i}.1": (DIM, DIM, 1, 1) for i in range(4)}
    convolutions |= {f"decode_head.lateral_convs.{i}": (DIM, DIM, 1, 1) for i in range(3)}
    convolutions |= {f"decode_head.fpn_convs.{i}": (DIM, DIM, 3, 3) for i in range(3)}
    convolutions |= {f"decode_head.{name}bottleneck": (DIM, n * DIM, 3, 3) for name, n in (("", 5), ("fpn_", 4))}
    convolutions["auxiliary_head.convs.0"] = (256, DIM, 3, 3)
    for name, shape in convolutions.items():
        shapes[f"{name}.conv.weight"] = shape
        norms[f"{name}.bn"] = shape[0]
    for name, width in norms.items():
        shapes |= {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    for head, width in (("decode_head", DIM), ("auxiliary_head", 256)):
        shapes |= {f"{head}.conv_seg.weight": (classes, width, 1, 1), f"{head}.conv_seg.bias": (classes,)}
    torch.manual_seed(0)
    state = {name: torch.rand(shape) * 0.4 + 0.1 for name, shape in shapes.items()}
    state |= {f"{name}.num_batches_tracked": torch.tensor(160_000) for name in norms}
    index = relative_position_index((GRID, GRID))
    return state | {f"backbone.blocks.{i}.attn.relative_position_index": index for i in range(DEPTH)}


@pytest.fixture
def file(tmp_path) -> Path:
    meta = {"mmseg_version": "0.11.0", "CLASSES": ("wall", "sky", "tree"), "PALETTE": [[1, 2, 3]] * 3, "iter": 160_000}
    torch.save({"meta": meta, "state_dict": published_state(), "optimizer": {"state": {}}}, tmp_path / "ade20k.pth")
    return tmp_path / "ade20k.pth"


def config(file: Path, **values: object) -> SegmentConfig:
    return SegmentConfig(**{**SHAPE, "weights": file, **values})


def test_every_value_of_a_published_segmenter_arrives(file):
    said: list[str] = []
    model = start_segmenter(config(file), CLASSES, said.append)
    assert "all weights were loaded" in said[0]
    found, wanted = model.state_dict(), published_state()
    wanted = {n.removeprefix("backbone."): v for n, v in wanted.items() if not n.endswith("relative_position_index")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert found["decode_head.bottleneck.bn.num_batches_tracked"] == 160_000


def test_a_published_segmenter_is_read_by_its_name(file, tmp_path, monkeypatch):
    with serving(tmp_path, monkeypatch) as server:
        server.files["/beitv2_base_patch16_224_pt1k_ftade20k.pth"] = file.read_bytes()
        model = start_segmenter(config(Path("beitv2_base_patch16_224_pt1k_ftade20k")), CLASSES, lambda _: None)
    assert torch.equal(model.decode_head.conv_seg.bias, published_state()["decode_head.conv_seg.bias"])


def test_with_other_classes_only_the_last_layers_are_new_and_another_size_resizes_its_positions(file):
    said: list[str] = []
    model = start_segmenter(config(file, image_size=4 * PATCH), 5, said.append)
    new = said[0].partition("as initialized: ")[2]
    assert {n.rpartition(".")[0] for n in new.split(", ")} == {"decode_head.conv_seg", "auxiliary_head.conv_seg"}
    assert len(model.blocks[0].attn.relative_position_bias_table) == 7 * 7 + 3


def test_it_goes_to_this_package_s_format_and_to_no_other(file, tmp_path):
    ours = convert(read(file).weights, "beitv2_fast")
    assert {name.split(".")[0] for name in ours} >= {"blocks", "fpn1", "decode_head", "auxiliary_head"}
    write(tmp_path / "ours.safetensors", ours, "beitv2_fast")
    model = start_segmenter(config(tmp_path / "ours.safetensors"), CLASSES, lambda _: None)
    assert_same_state(model.state_dict(), dict(ours))
    for target in ("timm", "published"):
        with pytest.raises(CheckpointError, match="only to beitv2_fast"):
            convert(ours, target)
    with pytest.raises(CheckpointError, match=r"of a segmenter, which train/segment\.py --weights reads"):
        create_model(checkpoint=file)


def test_its_backbone_starts_a_classifier(file):
    model = start_model(FinetuneConfig(**SHAPE, weights=file), ["a", "b"], lambda _: None)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, published_state()["backbone.blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("decode_head.fpn_convs.1.conv.weight", "as initialized: decode_head.fpn_convs.1.conv.weight"),
        ("backbone.blocks.2.norm1.weight", r"missing: blocks\.2\.norm1\.weight"),
    ],
)
def test_what_is_missing_is_named(tmp_path, broken, said):
    state = published_state()
    del state[broken]
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    lines: list[str] = []
    if broken.startswith("backbone"):
        with pytest.raises(CheckpointError, match=said):
            start_segmenter(config(tmp_path / "w.pth"), CLASSES, lines.append)
    else:
        start_segmenter(config(tmp_path / "w.pth"), CLASSES, lines.append)
        assert said in lines[0]


def test_a_published_segmenter_is_evaluated_without_a_training(file, tmp_path, capsys):
    write_scenes(tmp_path / "data" / "val", 3)
    write_scenes(tmp_path / "data" / "train", 2)
    options = [*SMALL[: SMALL.index("--channels")], "--ignore-labels", 7, "--base-size", 40, "--overlays", 0]
    for name, value in SHAPE.items():
        options += [f"--{name.replace('_', '-')}", value]
    options += ["--data", tmp_path / "data", "--out", tmp_path / "run", "--weights", file, "--evaluate"]
    options += ["--channels", 0, "--auxiliary-channels", 256, "--eval-batch-size", 2]
    for _ in range(2):  # also a second time, in the folder that the first one left
        assert call("segment", *options) == 0
    found = results(tmp_path / "run")
    model = start_segmenter(config(file), CLASSES, lambda _: None).eval()
    world = World(0, 1, torch.device("cpu"))
    val = tmp_path / "data" / "val"
    images = check_images(find_images(val / "images"), cache=None, min_size=1, workers=0)
    masks = find_masks(images, val / "masks", None, 0)
    folder = SegmentationFolder(images, masks, label_table((7,), False, ()))
    slide = Slide(GRID * PATCH, 21, 40, batch=2)
    assert found["weights"]["miou"] == evaluate_segmenter(model, folder, CLASSES, slide, world).numbers()["miou"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    state = published_state()
    del state["decode_head.bottleneck.conv.weight"]
    torch.save({"state_dict": state}, file)
    options[options.index("--out") + 1] = tmp_path / "other"
    assert call("segment", *options) == 2
    said = capsys.readouterr().err
    assert "is no whole segmenter of 3 classes: it lacks decode_head.bottleneck.conv.weight" in said
    torch.save({"model": {n: v for n, v in model.state_dict().items() if not n.startswith(SEGMENTER_HEADS)}}, file)
    assert call("segment", *options) == 2
    assert re.search("other has no checkpoint yet, and .*ade20k.pth is no segmenter", capsys.readouterr().err)
