"""The views: shapes, ranges, one crop seen twice, colours, masks."""

from __future__ import annotations

import random
from statistics import mean

import pytest
import torch
from PIL import Image

from beitv2_fast.data import IMAGENET_MEAN, IMAGENET_STD, EvalView, PretrainView, TokenizerView
from beitv2_fast.transforms import color_jitter, normalise, random_crop


def gradient(width=96, height=80, mode="RGB"):
    """Red grows to the right, green downwards: a crop's place can be read off its pixels."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, Image.new("L", (width, height), 90))).convert(mode)


def denormalise(image):
    return image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def pretrain_view(student=32, tokenizer=32, **options):
    return PretrainView(student, tokenizer, (4, 4), 6, 2, **options)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_views_are_float_tensors_of_the_size_asked_for(mode):
    image = gradient(mode=mode)
    generator = random.Random(0)
    for view in (TokenizerView(24), EvalView(24)):
        out = view(image, generator)["image"]
        assert (out.shape, out.dtype, out.is_contiguous()) == ((3, 24, 24), torch.float32, True)
        assert 0 <= out.min() <= out.max() <= 1
    out = pretrain_view(48, 24)(image, generator)
    assert out["student"].shape == (3, 48, 48) and out["student"].dtype == torch.float32
    assert out["tokenizer"].shape == (3, 24, 24)
    assert 0 <= out["tokenizer"].min() <= out["tokenizer"].max() <= 1
    assert (out["mask"].shape, out["mask"].dtype) == ((16,), torch.bool)


@pytest.mark.parametrize("kind", ["block", "random"])
def test_the_mask_always_has_the_wanted_number_of_patches(kind):
    view, generator = pretrain_view(mask_kind=kind), random.Random(0)
    assert {view(gradient(), generator)["mask"].sum().item() for _ in range(50)} == {6}


@pytest.mark.parametrize(("tokenizer_size", "resample"), [(32, "bicubic"), (32, "lanczos"), (16, "bicubic")])
def test_student_and_tokenizer_see_the_same_crop_and_flip(tokenizer_size, resample):
    view = pretrain_view(32, tokenizer_size, color_jitter=0.0, tokenizer_resample=resample)
    image, flips = gradient(), set()
    for seed in range(20):
        out = view(image, random.Random(seed))
        student = denormalise(out["student"])
        small = torch.nn.functional.interpolate(student[None], (tokenizer_size,) * 2, mode="area")[0]
        assert (small - out["tokenizer"]).abs().max() < 0.03
        flips.add(bool(student[0, :, 0].mean() > student[0, :, -1].mean()))
    assert flips == {True, False}


def test_only_the_student_s_colours_are_jittered():
    image = gradient()
    plain, jittered = (pretrain_view(color_jitter=j)(image, random.Random(4)) for j in (0.0, 0.4))
    assert torch.equal(plain["tokenizer"], jittered["tokenizer"])
    assert (plain["student"] - jittered["student"]).abs().mean() > 0.05


def test_the_student_is_normalised_by_imagenet_statistics():
    image = Image.new("RGB", (40, 40), (255, 0, 51))
    student = pretrain_view(color_jitter=0.0)(image, random.Random(0))["student"]
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert student[channel].sub(expected).abs().max() < 1e-5


@pytest.mark.parametrize("view", [TokenizerView(24), pretrain_view(32, 24), EvalView(24)])
def test_a_view_follows_from_image_and_generator_alone(view):
    first, again = (view(gradient(), random.Random(5)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = view(gradient(), random.Random(6))
    assert all(torch.equal(first[name], other[name]) for name in first) == isinstance(view, EvalView)


def test_crops_have_the_promised_area_and_aspect_and_stay_inside():
    generator, size, shares = random.Random(0), (300, 200), []
    for _ in range(2000):
        left, top, right, bottom = random_crop(size, (0.2, 0.8), generator)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert 0.73 < (right - left) / (bottom - top) < 1.37
        shares.append((right - left) * (bottom - top) / 60000)
    assert 0.19 < min(shares) < 0.22 and 0.75 < max(shares) < 0.82
    # Uniform would be 0.5; the largest crops fit less often in a 3:2 image.
    assert 0.44 < mean(shares) < 0.51


@pytest.mark.parametrize(("size", "expected"), [((400, 20), (27, 20)), ((20, 400), (20, 27))])
def test_where_no_crop_fits_the_largest_centre_crop_is_taken(size, expected):
    left, top, right, bottom = random_crop(size, (1.0, 1.0), random.Random(0))
    assert (right - left, bottom - top) == expected
    assert abs(left + right - size[0]) <= 1 and abs(top + bottom - size[1]) <= 1


def test_the_tokenizer_s_resize_equals_cutting_out_and_resizing():
    image, generator = gradient(), random.Random(1)
    left, top, right, bottom = random_crop(image.size, (0.08, 1.0), random.Random(1))
    out = TokenizerView(24)(image, generator)["image"]
    cut = image.crop((left, top, right, bottom)).resize((24, 24), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(cut.tobytes())).view(24, 24, 3).permute(2, 0, 1) / 255
    difference = min((out - expected).abs().max(), (out.flip(-1) - expected).abs().max())
    assert difference < 2.5 / 255  # resize(box=...) also sees the pixels just outside the crop


def test_the_evaluation_view_is_the_centre():
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (20, 10, 40, 30))
    assert EvalView(10, 0.5)(image)["image"].min() > 0.85
    whole = EvalView(40, 1.0)(image)["image"]
    assert whole[0, 0, 0] == 0 and whole[0, 20, 20] == 1 and whole[0].mean() == pytest.approx(0.25, abs=0.01)


def test_colour_jitter_is_the_formula_of_its_docstring():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    generator, strength = random.Random(2), 0.1
    out = color_jitter(image, strength, generator)
    again = random.Random(2)
    steps = ["brightness", "contrast", "saturation"]
    again.shuffle(steps)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    for step in steps:
        factor = again.uniform(1 - strength, 1 + strength)
        luma = (image * weights).sum(0, keepdim=True)
        base = {"brightness": torch.zeros(1), "contrast": luma.mean(), "saturation": luma}[step]
        image = base + factor * (image - base)
    torch.testing.assert_close(out, image)


def test_jitter_treats_a_grey_image_like_its_rgb_copy():
    grey = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    one = color_jitter(grey, 0.4, random.Random(3))
    three = color_jitter(grey.expand(3, -1, -1), 0.4, random.Random(3))
    torch.testing.assert_close(normalise(one), normalise(three), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenizerView(0), "size is 0"),
        (lambda: TokenizerView(8, (0.0, 1.0)), "share of the image"),
        (lambda: TokenizerView(8, (0.9, 0.2)), "share of the image"),
        (lambda: EvalView(8, 1.5), "share of the image"),
        (lambda: pretrain_view(color_jitter=1.5), "color_jitter is 1.5"),
        (lambda: pretrain_view(mask_kind="stripes"), "stripes"),
        (lambda: pretrain_view(tokenizer_resample="nearest"), "nearest"),
        (lambda: PretrainView(32, 32, (4, 4), 17), "num_masked is 17"),
    ],
)
def test_impossible_views_are_refused_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
