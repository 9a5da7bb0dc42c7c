"""How a finished tokenizer is judged."""

from __future__ import annotations

import torch
from torch import Tensor

from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig
from beitv2_fast.train.tokenizer_quality import tokenizer_quality


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
