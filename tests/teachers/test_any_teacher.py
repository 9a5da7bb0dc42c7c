"""Any model of open_clip, timm and transformers teaches with its own patches and its own image size."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast.errors import UserError
from beitv2_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalize
from beitv2_fast.runs.checkpoints import save_weights
from beitv2_fast.teachers import create_teacher
from beitv2_fast.teachers.networks import CLIP_MEAN, CLIP_STD

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (extra: teachers)")
timm = pytest.importorskip("timm", reason="timm is not installed (extra: teachers)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: teachers)")
HALF = (0.5, 0.5, 0.5)
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def clip_of(folder: Path, name: str, vision: dict, **values: object) -> Path:
    """A small network of this name in open_clip, its random weights in a file."""
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    (folder / f"{name}.json").write_text(
        json.dumps({"embed_dim": 20, "vision_cfg": vision, "text_cfg": text, **values})
    )
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    save_weights(open_clip.create_model(name).state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize(("patch", "size", "grid"), [(32, 224, 7), (14, 56, 4), (16, 64, 4)])
def test_open_clip_s_models_have_the_grids_of_their_own_patches(tmp_path, patch, size, grid):
    name = f"small-{patch}"
    vision = {"image_size": size, "layers": 2, "width": 48, "patch_size": patch, "head_width": 16}
    file = clip_of(tmp_path, name, vision)
    teacher = create_teacher(f"open_clip:{name}", (grid, grid), str(file))
    assert (teacher.patch_size, teacher.input_size, teacher.dim) == (patch, size, 20)
    own = open_clip.create_model(name, pretrained=str(file)).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        out = own.visual.forward_intermediates(
            normalize(images, CLIP_MEAN, CLIP_STD), indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        close(teacher(images, (grid, grid)), out["image_intermediates"][0] @ own.visual.proj)


def test_a_grid_of_another_size_is_had_by_positions_or_if_asked_for_by_features(tmp_path):
    vision = {"image_size": 56, "layers": 2, "width": 48, "patch_size": 14, "head_width": 16}
    file = str(clip_of(tmp_path, "small-14", vision))
    images = torch.rand(2, 3, 56, 56)
    own = create_teacher("open_clip:small-14", (4, 4), file)
    resized = create_teacher("open_clip:small-14", (7, 7), file, resize=True)
    square = own(images, (4, 4)).transpose(1, 2).unflatten(2, (4, 4))
    close(
        resized(images, (7, 7)).transpose(1, 2).unflatten(2, (7, 7)),
        F.interpolate(square, (7, 7), mode="bicubic", antialias=True),
    )
    positions = create_teacher("open_clip:small-14", (7, 7), file)
    other = open_clip.create_model("small-14", pretrained=file, force_image_size=98).eval()
    larger = F.interpolate(images, (98, 98), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        tokens = other.visual.forward_intermediates(
            normalize(larger, CLIP_MEAN, CLIP_STD), indices=1, normalize_intermediates=True, output_fmt="NLC"
        )["image_intermediates"][0]
        close(positions(images, (7, 7)), tokens @ other.visual.proj)
    assert len({t.fingerprint() for t in (own, resized, positions)}) == 3


def test_open_clip_s_siglip_is_read_by_its_timm_tower(tmp_path):
    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none"}
    file = clip_of(tmp_path, "small-siglip", {**vision, "timm_model_pretrained": False}, embed_dim=192)
    images = torch.rand(1, 3, 224, 224)
    teacher = create_teacher("open_clip:small-siglip", (14, 14), str(file))
    own = open_clip.create_model("small-siglip", pretrained=str(file)).visual.eval()
    mean, std = own.image_mean, own.image_std
    with torch.no_grad():
        expected = own.trunk.forward_features(normalize(images, tuple(mean), tuple(std)))
    close(teacher(images, (14, 14)), expected[:, -196:])


def test_open_clip_s_tags_are_asked_for_with_the_gelu_of_their_weights(tmp_path, monkeypatch):
    vision = {"image_size": 224, "layers": 1, "width": 32, "patch_size": 32, "head_width": 16}
    clip_of(tmp_path, "small-32", vision)
    small, asked = open_clip.create_model("small-32").eval(), []
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: asked.append((a, k)) or small)
    create_teacher("open_clip:ViT-B-32@openai", (7, 7))
    create_teacher("open_clip:ViT-B-32@laion2b_s34b_b79k", (7, 7))
    assert asked == [
        (("ViT-B-32",), {"pretrained": "openai", "force_quick_gelu": True}),
        (("ViT-B-32",), {"pretrained": "laion2b_s34b_b79k"}),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("open_clip:ViT-B-32", "needs its weights' tag, open_clip:ViT-B-32@TAG. There are: openai, laion400m"),
        ("open_clip:ViT-B-33@openai", "open_clip has no model 'ViT-B-33'; near: .*ViT-B-32"),
        ("open_clip:ViT-B-32@nothing", "there is no checkpoint file nothing"),
        ("transformers:no/such/folder", "could not be obtained"),
    ],
)
def test_a_name_without_a_model_says_what_there_is(name, said, caplog):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(UserError, match=said):
        create_teacher(name, (7, 7))


def saved(folder: Path, model: object, mean: tuple[float, ...], std: tuple[float, ...]) -> object:
    """A folder of transformers, whose weights are random in every entry."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model.eval()


def vision_models() -> dict[str, tuple[object, int]]:
    """Small models of transformers, and how many tokens stand before those of the patches."""
    t, values = transformers, {**SMALL, "image_size": 64, "patch_size": 16}
    registers = t.Dinov2WithRegistersConfig(**values, num_register_tokens=4)
    return {
        "dinov2": (t.Dinov2Model(t.Dinov2Config(**values)), 1),
        "registers": (t.Dinov2WithRegistersModel(registers), 5),
        "siglip": (t.SiglipVisionModel(t.SiglipVisionConfig(**values)), 0),
        "vit": (t.ViTModel(t.ViTConfig(**values)), 1),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["dinov2", "registers", "siglip", "vit"])
def test_a_vision_model_of_transformers_gives_its_patch_tokens(tmp_path, images, kind):
    model, before = vision_models()[kind]
    model = saved(tmp_path, model, IMAGENET_MEAN, IMAGENET_STD)
    teacher = create_teacher(f"transformers:{tmp_path}", (4, 4))
    assert (teacher.patch_size, teacher.input_size, teacher.dim) == (16, 64, 24)
    with torch.no_grad():
        expected = model(pixel_values=normalize(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
    close(teacher(images, (4, 4)), expected[:, before:])
    assert create_teacher(f"transformers:{tmp_path}", (6, 6))(images, (6, 6)).shape == (2, 36, 24)
    assert create_teacher(f"transformers:{tmp_path}", (3, 3), resize=True)(images, (3, 3)).shape == (2, 9, 24)


def test_of_transformers_clip_only_the_images_tower_teaches_after_its_last_norm(tmp_path, images):
    t = transformers
    vision = t.CLIPVisionConfig(**SMALL, image_size=64, patch_size=16)
    text = t.CLIPTextConfig(**SMALL, vocab_size=32, max_position_embeddings=8)
    config = t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    model = saved(tmp_path, t.CLIPModel(config), CLIP_MEAN, CLIP_STD)
    teacher = create_teacher(f"transformers:{tmp_path}", (4, 4))
    with torch.no_grad():
        last = model.vision_model(pixel_values=normalize(images, CLIP_MEAN, CLIP_STD)).last_hidden_state
        close(teacher(images, (4, 4)), model.vision_model.post_layernorm(last)[:, 1:])
    assert not any("text" in name for name, _ in teacher.named_parameters())


def test_transformers_convolutional_networks_teach_their_last_map(tmp_path, images):
    t = transformers
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1])
    model = saved(tmp_path, t.ResNetModel(config), HALF, HALF)
    teacher = create_teacher(f"transformers:{tmp_path}", (2, 2))
    assert (teacher.patch_size, teacher.dim) == (32, 24)
    with torch.no_grad():
        expected = model(pixel_values=normalize(images, HALF, HALF)).last_hidden_state
    close(teacher(images, (2, 2)), expected.flatten(2).transpose(1, 2))


def test_a_repository_s_code_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "m.C", "AutoModel": "m.M"}})
    )
    (tmp_path / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "m.P"}, "image_processor_type": "P"})
    )
    with pytest.raises(UserError, match="could not be obtained"):
        create_teacher(f"transformers:{tmp_path}", (4, 4))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "grid"), [("vit_base_patch32_siglip_256.v2_webli", 8), ("vit_small_patch14_dinov2.lvd142m", 37)]
)
def test_timm_s_siglip_and_dinov2_teach_at_their_own_size(tmp_path, name, grid):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    save_weights(model.state_dict(), tmp_path / "w.safetensors")
    teacher = create_teacher(f"timm:{name}", (grid, grid), str(tmp_path / "w.safetensors"))
    size = model.pretrained_cfg["input_size"][-1]
    assert teacher.input_size == size
    images = torch.rand(1, 3, size, size)
    mean, std = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    with torch.no_grad():
        expected = model.forward_features(normalize(images, mean, std))[:, model.num_prefix_tokens :]
    close(teacher(images, (grid, grid)), expected)


def test_a_timm_model_of_one_size_is_refused_at_another_grid_and_resized_if_asked_for(tmp_path):
    save_weights(timm.create_model("mixer_s32_224").state_dict(), tmp_path / "w.safetensors")
    name, file = "timm:mixer_s32_224", str(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="--teacher-resize"):
        create_teacher(name, (8, 8), file)
    images = torch.rand(1, 3, 224, 224)
    own = create_teacher(name, (7, 7), file)(images, (7, 7)).transpose(1, 2).unflatten(2, (7, 7))
    found = create_teacher(name, (8, 8), file, resize=True)(images, (8, 8)).transpose(1, 2).unflatten(2, (8, 8))
    close(found, F.interpolate(own, (8, 8), mode="bicubic", antialias=True))
