"""How a finished tokenizer is judged."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from PIL import Image
from torch import Tensor

from beitv2_fast.config.presets import TOKENIZER
from beitv2_fast.config.training import TokenizerConfig
from beitv2_fast.data.views import EvalView
from beitv2_fast.downstream import tokenizer_quality as quality
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.runs.checkpoints import read_weights
from beitv2_fast.teachers import create_teacher
from beitv2_fast.train.tokenizer_quality import tokenizer_quality
from beitv2_fast.weights.build import load_run_model

from ..support.downstream import write_colors
from ..support.training import TINY, call
from ..support.training import TOKENIZER as TOKENIZER_OPTIONS


def tokenizer(codes: int = 8) -> Tokenizer:
    torch.manual_seed(0)
    shape = ViTConfig(image_size=32, patch_size=8, dim=24, depth=1, heads=2, position="absolute", init_std=0.2)
    model = Tokenizer(TokenizerModelConfig(encoder=shape, decoder_depth=1, num_codes=codes, code_dim=4, teacher_dim=6))
    model.quantize.start(model.features(torch.rand(8, 3, 32, 32)))
    return model.eval()


def reconstruction(model: Tokenizer):
    """A teacher that the tokenizer imitates perfectly."""

    def teacher(images: Tensor, grid: tuple[int, int]) -> Tensor:
        return model(images, torch.zeros(len(images), 16, 6)).reconstruction

    return teacher


def test_a_perfect_imitation_has_similarity_1_and_an_opposite_one_minus_1():
    model, images = tokenizer(), torch.rand(6, 3, 32, 32)
    same = reconstruction(model)
    assert abs(tokenizer_quality(model, same, images.split(4))["similarity"] - 1) < 1e-6
    assert abs(tokenizer_quality(model, lambda *x: -same(*x), images.split(4))["similarity"] + 1) < 1e-6


def test_usage_and_perplexity_count_the_codes_of_all_images():
    model, images = tokenizer(), torch.rand(6, 3, 32, 32)
    found = tokenizer_quality(model, reconstruction(model), images.split(4))
    counts = torch.bincount(model.encode(images).flatten(), minlength=8)
    shares = counts[counts > 0] / counts.sum()
    assert found["used_codes"] == (counts > 0).double().mean().item() and found["images"] == 6
    assert abs(found["perplexity"] - (-(shares * shares.log()).sum()).exp().item()) < 1e-4


def test_larger_images_are_shrunk_for_the_tokenizer_and_not_for_the_teacher():
    model, sizes = tokenizer(), []

    def teacher(images: Tensor, grid: tuple[int, int]) -> Tensor:
        sizes.append((tuple(images.shape[-2:]), grid))
        return torch.ones(len(images), 16, 6)

    assert tokenizer_quality(model, teacher, [torch.rand(2, 3, 64, 64)])["images"] == 2
    assert sizes == [((64, 64), (4, 4))]


def test_the_published_tokenizers_have_presets():
    found = {name: (TOKENIZER[name].decoder_depth, TOKENIZER[name].teacher) for name in TOKENIZER if "base" in name}
    assert found == {"base": (3, "clip"), "base_1_block": (1, "clip"), "base_1_block_dino": (1, "dino")}


def test_a_training_tells_similarity_and_unused_codes_of_the_validation_images_after_every_epoch(tmp_path):
    """The last line is what the finished run has on the same images."""
    data = write_colors(tmp_path / "data" / "train", 4)
    write_colors(tmp_path / "data" / "val", 3)  # 9 images: no multiple of the batch
    out, options = tmp_path / "run", [*TINY, *TOKENIZER_OPTIONS, "--data", data.parent]
    assert call("tokenizer", *options, "--out", out, "--keep-checkpoints", 3) == 0
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9] and {line["val_images"] for line in lines} == {9}
    model, config = load_run_model(out)
    teacher = create_teacher(config.teacher, model.grid)
    view = EvalView(128)
    images = [view(Image.open(file).convert("RGB"))["image"] for file in sorted((data.parent / "val").rglob("*.png"))]
    expected = tokenizer_quality(model, teacher, torch.stack(images).split(4))
    last = {name.removeprefix("val_"): value for name, value in lines[-1].items() if name != "step"}
    assert last == pytest.approx(expected, rel=1e-5)
    assert expected["unused_codes"] == round(16 * (1 - expected["used_codes"]))
    assert "codes unused" in (out / "log.txt").read_text()
    highest = max(lines, key=lambda line: line["val_similarity"])["step"]
    folders = out / "best", out / "checkpoints" / f"step_{highest:08d}"
    kept, of_step = (read_weights(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(kept[name], value) for name, value in of_step.items())
    none = tmp_path / "none"
    assert call("tokenizer", *options, "--data", data, "--out", none, "--epochs", 1) == 0
    assert not (none / "evaluation.jsonl").exists()


@pytest.mark.parametrize("count", [5, 6])
def test_two_ranks_see_every_validation_image_once(count, tmp_path):
    model = tokenizer()
    images = torch.rand(count, 3, 32, 32)
    view = SimpleNamespace(
        config=TokenizerConfig(batch_size=2, workers=0, precision="fp32"), tokenizer=model, run=Mock(path=tmp_path)
    )
    view.teacher = reconstruction(model)
    view.dataset = range(count)
    parts = []

    def gathered(rank):
        def keep(sums):
            parts.append(sums)
            return sums

        return SimpleNamespace(rank=rank, size=2, device=torch.device("cpu"), sum=keep, first=int)

    def loader(dataset, keys, batch, workers):
        return [{"image": images[[i for _, i in keys[k : k + batch]]]} for k in range(0, len(keys), batch)]

    with patch.object(quality, "keyed_loader", loader):
        for rank in (0, 1):
            view.world = gathered(rank)
            quality.TokenizerValidation.__call__(view, 1, {"weights": model}, lambda: None)
    whole = tokenizer_quality(model.eval(), view.teacher, [images])
    assert quality.summary(sum(parts)) == pytest.approx(whole)
