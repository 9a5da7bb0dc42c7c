"""Models of another dtype than fp32 (``.half()``, ``.bfloat16()``, ``.double()``) compute what fp32's do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beitv2_fast import classify, features
from beitv2_fast.downstream.segmentation.model import Segmenter, SegmenterConfig

from ..support import weights
from ..support.dispatched import Dispatched

# Greatest difference to fp32, over fp32's greatest value: 8 roundings of the dtype; of fp64, 64 of fp32's own.
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16, torch.float32)}
TOLERANCE = {torch.float16: 8 * EPS[torch.float16], torch.bfloat16: 8 * EPS[torch.bfloat16]}
TOLERANCE[torch.float64] = 64 * EPS[torch.float32]
MASK = torch.arange(9).expand(3, 9) < 4
LABELS = torch.arange(12) % 20


def images() -> Tensor:
    return torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def segmenter() -> Segmenter:
    config = SegmenterConfig(weights.vit("absolute"), 5, channels=8, auxiliary_channels=8, layers=(0, 1, 1, 2))
    torch.manual_seed(0)
    return Segmenter(config).eval()  # random variances would be negative


# name -> (the model, what it computes of images in [0, 1])
COMPUTED = {
    "tokenizer.features": (weights.tokenizer, lambda model, x: [model.features(x)]),
    "tokenizer.decode": (
        weights.tokenizer,
        lambda model, x: [model.decode(model.quantize.codebook[:9].expand(3, 9, 8))],
    ),
    "student": (weights.student, lambda model, x: [model(x, MASK, LABELS, 4).losses, *features(model, x)]),
    "student with separate heads": (
        lambda: weights.student("absolute", shared_head=False),
        lambda model, x: [model(x, MASK, LABELS).losses, *model.predict(x, MASK)],
    ),
    "classifier": (weights.classifier, lambda model, x: [model(x), classify(model, x)]),
    "segmenter": (segmenter, lambda model, x: [*model(x)]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", COMPUTED)
def test_a_model_of_another_dtype_computes_what_fp32_s_does_from_images_of_either(name, dtype):
    build, compute = COMPUTED[name]
    model = build()
    other, expected = copy.deepcopy(model).to(dtype), compute(model, images())
    for x in (images(), images().to(dtype)):
        for ours, fp32 in zip(compute(other, x), expected, strict=True):
            assert (ours.double() - fp32.double()).abs().max() <= TOLERANCE[dtype] * fp32.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_tokenizer_of_another_dtype_finds_the_codes_of_its_features_and_has_fp32_s_loss(dtype):
    model = weights.tokenizer()
    other, target = copy.deepcopy(model).to(dtype), torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(2))
    out, expected = other(images(), target.to(dtype)), model(images(), target)
    nearest = (F.normalize(other.features(images()).double(), dim=-1) @ model.quantize.codebook.double().T).argmax(-1)
    assert torch.equal(other.encode(images()), nearest) and torch.equal(out.indices, nearest)
    assert (nearest == model.encode(images())).double().mean() >= {torch.float64: 1.0}.get(dtype, 0.8)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE[dtype])
    assert other.similarity(images(), target).mean().item() == pytest.approx(1 - out.rec_loss.item(), abs=1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_training_step_in_another_dtype_moves_an_fp32_codebook_and_has_fp32_s_gradients(dtype):
    model = weights.tokenizer().train()
    other, target = copy.deepcopy(model).to(dtype), torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(2))
    before = model.quantize.codebook.clone()
    for network in (model, other):
        network(images(), target).loss.backward()
    ours, fp32 = other.quantize.codebook, model.quantize.codebook
    assert ours.dtype == torch.float32 and not torch.equal(ours, before)
    assert F.cosine_similarity(ours, fp32).min() > (1 - 1e-6 if dtype == torch.float64 else 0.98)
    for (name, parameter), (_, wanted) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert parameter.grad.dtype == dtype
        if name.startswith("decode_task_layer.2"):  # no codes between it and the loss but by the decoder's input
            error = (parameter.grad.double() - wanted.grad.double()).norm() / wanted.grad.norm()
            assert error < (1e-4 if dtype == torch.float64 else 0.2)


def test_a_frozen_tokenizer_has_the_bits_of_autocast_and_converts_its_weights_once():
    model = weights.tokenizer()
    frozen, casts = copy.deepcopy(model).frozen(torch.bfloat16), []
    for network in (model, frozen):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Dispatched() as seen:
            casts.append((network.features(images()), seen.counts["aten::_to_copy"]))
    assert torch.equal(casts[0][0], casts[1][0])
    # of each block the weights of four products and their biases, and of the patches' convolution
    assert casts[0][1] - casts[1][1] == 8 * len(model.encoder.blocks) + 2
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.encode(images())
    assert torch.equal(frozen.encode(images()), expected)  # the autocast is its own
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
