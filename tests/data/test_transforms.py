"""The views: shapes, ranges, one crop seen twice, colors, masks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from beitv2_fast.data.draws import image_keys, random_crops
from beitv2_fast.data.loaders import choose_loader
from beitv2_fast.data.views import EvalView, FinetuneView, PretrainView, TokenizerView, timm_policy
from beitv2_fast.errors import UserError
from beitv2_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD


def gradient(width=96, height=80, mode="RGB"):
    """Red grows to the right, green downwards: a crop's place can be read off its pixels."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, Image.new("L", (width, height), 90))).convert(mode)


def denormalize(image):
    return image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def pretrain_view(student=32, tokenizer=32, **options):
    return PretrainView(student, tokenizer, (4, 4), 6, 2, **options)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_views_are_float_tensors_of_the_size_asked_for(mode):
    image = gradient(mode=mode)
    for view in (TokenizerView(24), FinetuneView(24), EvalView(24)):
        out = view(image, 1)["image"]
        assert (out.shape, out.dtype, out.is_contiguous()) == ((3, 24, 24), torch.float32, True)
        assert 0 <= out.min() <= out.max() <= 1
    out = pretrain_view(48, 24)(image, 1)
    assert out["student"].shape == (3, 48, 48) and out["student"].dtype == torch.float32
    assert out["tokenizer"].shape == (3, 24, 24)
    assert 0 <= out["tokenizer"].min() <= out["tokenizer"].max() <= 1
    assert (out["mask"].shape, out["mask"].dtype) == ((16,), torch.bool)


@pytest.mark.parametrize(("tokenizer_size", "resample"), [(32, "bicubic"), (32, "lanczos"), (16, "bicubic")])
def test_student_and_tokenizer_see_the_same_crop_and_flip(tokenizer_size, resample):
    view = pretrain_view(32, tokenizer_size, color_jitter=0.0, tokenizer_resample=resample)
    image, flips = gradient(), set()
    for seed in range(20):
        out = view(image, seed)
        student = denormalize(out["student"])
        small = torch.nn.functional.interpolate(student[None], (tokenizer_size,) * 2, mode="area")[0]
        assert (small - out["tokenizer"]).abs().max() < 0.03
        flips.add(bool(student[0, :, 0].mean() > student[0, :, -1].mean()))
    assert flips == {True, False}


@pytest.mark.parametrize(("tokenizer_size", "most"), [(32, 1e-6), (16, 0.03)])
@pytest.mark.parametrize("jitter_on", ["crop", "image"])
def test_both_views_carry_one_and_the_same_jitter(tokenizer_size, most, jitter_on):
    image = gradient()
    for key in range(4):
        plain, jittered = (
            pretrain_view(32, tokenizer_size, color_jitter=j, jitter_on=jitter_on)(image, key) for j in (0.0, 0.4)
        )
        assert (plain["tokenizer"] - jittered["tokenizer"]).abs().mean() > 0.01
        student = torch.nn.functional.interpolate(
            denormalize(jittered["student"])[None], (tokenizer_size,) * 2, mode="area"
        )
        assert (student[0] - jittered["tokenizer"]).abs().max() < most


def test_on_the_whole_image_colors_change_before_anything_is_cut_out():
    """As torchvision's ColorJitter with these factors, in this order, then the view without it."""
    image = gradient()
    view = pretrain_view(32, 16, color_jitter=0.4, jitter_on="image")
    draws = view.draw(np.array([image.size]), np.array([4], np.uint64))
    for step, factor in zip(draws["jitter_step"][0].tolist(), draws["jitter_factor"][0].tolist(), strict=True):
        image = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[step](
            image, factor
        )
    expected, found = pretrain_view(32, 16, color_jitter=0.0)(image, 4), view(gradient(), 4)
    assert all(torch.equal(expected[name], found[name]) for name in ("student", "tokenizer"))
    assert not torch.equal(found["student"], pretrain_view(32, 16, color_jitter=0.4)(gradient(), 4)["student"])
    assert choose_loader("auto", view=view)[0] == "torchvision"
    with pytest.raises(UserError, match="--loader dali: --jitter-on image takes PIL images"):
        choose_loader("dali", view=view)


def test_the_student_is_normalized_by_imagenet_statistics():
    image = Image.new("RGB", (40, 40), (255, 0, 51))
    student = pretrain_view(color_jitter=0.0)(image, 0)["student"]
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert student[channel].sub(expected).abs().max() < 1e-5


@pytest.mark.parametrize("view", [TokenizerView(24), pretrain_view(32, 24), FinetuneView(24), EvalView(24)])
def test_a_view_follows_from_image_and_key_alone(view):
    first, again = (view(gradient(), 5) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = view(gradient(), 6)
    assert all(torch.equal(first[name], other[name]) for name in first) == isinstance(view, EvalView)


def crops_of(size, scale, count=1):
    keys = image_keys(0, np.zeros(count, np.int64), np.arange(count))
    return random_crops(np.tile(size, (count, 1)), scale, keys)


def test_crops_have_the_promised_area_and_aspect_and_stay_inside():
    left, top, right, bottom = crops_of((300, 200), (0.2, 0.8), 2000).T
    assert (left >= 0).all() and (left < right).all() and (right <= 300).all()
    assert (top >= 0).all() and (top < bottom).all() and (bottom <= 200).all()
    aspect = (right - left) / (bottom - top)
    assert 0.73 < aspect.min() < 0.77 and 1.31 < aspect.max() < 1.37
    shares = (right - left) * (bottom - top) / 60000
    assert 0.19 < shares.min() < 0.22 and 0.75 < shares.max() < 0.82


@pytest.mark.parametrize(("size", "expected"), [((400, 20), (27, 20)), ((20, 400), (20, 27))])
def test_where_no_crop_fits_the_largest_center_crop_is_taken(size, expected):
    left, top, right, bottom = crops_of(size, (1.0, 1.0))[0].tolist()
    assert (right - left, bottom - top) == expected
    assert abs(left + right - size[0]) <= 1 and abs(top + bottom - size[1]) <= 1


def test_the_evaluation_view_is_the_center():
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (20, 10, 40, 30))
    assert EvalView(10, 0.5)(image)["image"].min() > 0.85
    whole = EvalView(40, 1.0)(image)["image"]
    assert whole[0, 0, 0] == 0 and whole[0, 20, 20] == 1 and whole[0].mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenizerView(0), "size is 0"),
        (lambda: FinetuneView(8, magnitude=31), "magnitude 31"),
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


def test_a_policy_is_timm_s_with_the_reference_s_settings():
    """The same crop through timm's own transform, from the same seed."""
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    policy = "rand-m9-mstd0.5-inc1"
    view, plain = FinetuneView(24, policy=policy), FinetuneView(24, ops=0)
    settings = {"translate_const": 10, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    transform, changed = auto_augment.rand_augment_transform(policy, settings), 0
    states = random.getstate(), np.random.get_state()[1].copy()
    for key in range(12):
        image = gradient()
        draws = view.draw(np.array([image.size]), np.array([key], np.uint64))
        crop = plain(image, key)["image"].mul(255).round().to(torch.uint8)
        before = random.getstate(), np.random.get_state()
        seed = int(draws["augment_op"][0, 0] * 2**53)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        expected = np.asarray(transform(Image.fromarray(crop.permute(1, 2, 0).numpy())))
        random.setstate(before[0])
        np.random.set_state(before[1])
        found = view(image, key)["image"].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected)
        changed += not np.array_equal(found, crop.permute(1, 2, 0).numpy())
    assert 4 < changed < 12  # an operation is left out in half of the cases, both in a quarter
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])


def test_every_operation_of_a_policy_works_at_its_strongest():
    pytest.importorskip("timm")
    image = Image.fromarray(np.random.default_rng(0).integers(1, 256, (24, 24, 3), dtype=np.uint8))
    results = {}
    for op in timm_policy("rand-m10-inc1", 24).ops:
        op.prob = 1.0
        results[op.name] = np.asarray(op(image))
    assert len(results) == 15 and all(result.shape == (24, 24, 3) for result in results.values())
    assert not results["PosterizeIncreasing"].any()  # 0 bits are kept
    weaker = next(op for op in timm_policy("rand-m9-inc1", 24).ops if op.name == "PosterizeIncreasing")
    weaker.prob = 1.0
    assert np.array_equal(np.asarray(weaker(image)), np.asarray(image) & 128)  # 1 bit: 4 - int(0.9 * 4)


def test_a_policy_that_timm_does_not_know_is_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="augment_policy is 'auto-m9'"):
        FinetuneView(8, policy="auto-m9")
