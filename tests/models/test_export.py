"""torch.export: quantizers and models as root modules, saved and loaded again."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from beitv2_fast import FusedVectorQuantizer, ResidualVectorQuantizer, Tokenizer, TokenizerModelConfig, ViTConfig


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def saved_and_loaded(module: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """The exported program, of any batch size, after a way through a file."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(copy.deepcopy(module), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "euclidean"},
        {"learning": "gradient"},
        {"heads": 2},
        {"gradient": "rotation", "channel_last": False},
        {"restart_below": 0.5},
    ],
    ids=str,
)
def test_an_exported_quantizer_answers_and_counts_like_the_module(options):
    quantizer = FusedVectorQuantizer(16, 8, **options).train()
    quantizer(noise(40, 8))
    quantizer.eval()
    shape = (3, 8, 5) if "channel_last" in options else (3, 5, 8)
    exported = saved_and_loaded(quantizer, (noise(*shape),))
    z = 2 * noise(7, *shape[1:])
    expected, actual = quantizer(z), exported(z)
    assert type(actual) is type(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    buffers = dict(exported.named_buffers())
    for name, value in quantizer.named_buffers():
        assert torch.equal(buffers[name], value), name


def test_an_exported_residual_quantizer_answers_like_the_module():
    quantizer = ResidualVectorQuantizer(16, 8, 3).train()
    quantizer(noise(40, 8))
    quantizer.eval()
    exported = saved_and_loaded(quantizer, (noise(3, 5, 8),))
    z = 2 * noise(7, 5, 8)
    for a, b in zip(exported(z), quantizer(z), strict=True):
        assert torch.equal(a, b)


class Codes(nn.Module):
    """Images to codes, the method ``encode`` of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)


def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=32, patch_size=8, dim=24, depth=2, heads=2, position="absolute")
    config = TokenizerModelConfig(encoder, decoder_depth=1, num_codes=16, code_dim=8, teacher_dim=4)
    return Tokenizer(config).eval()


def test_an_exported_encoder_gives_the_tokenizers_codes():
    model, images = Codes(tokenizer()), noise(7, 3, 32, 32).sigmoid()
    exported = saved_and_loaded(model, (images[:2],))
    assert torch.equal(exported(images), model(images))
    assert len(exported(images).unique()) > 1


def test_an_exported_tokenizer_gives_the_losses_of_the_module():
    model, images, target = tokenizer(), noise(7, 3, 32, 32).sigmoid(), noise(7, 16, 4)
    exported = saved_and_loaded(model, (images[:2], target[:2]))
    for a, b in zip(exported(images, target), model(images, target), strict=True):
        torch.testing.assert_close(a, b)
