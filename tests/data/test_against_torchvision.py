"""The views beside torchvision's own transforms on PIL images: the same pixels, and the same chances.

The reference implementation uses those transforms. Where a transform draws, ours and theirs are compared as samples.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F

from beitv2_fast.data.draws import image_keys, jitter_steps, random_crops, random_flips
from beitv2_fast.data.views import EvalView, PretrainView, TokenizerView, color_jitter, cut_out, jitter_batched

SAMPLES = 4000
# Two samples of the same distribution exceed this Kolmogorov-Smirnov distance once in 10,000 times.
KS_MAX = math.sqrt(-math.log(1e-4 / 2)) / math.sqrt(SAMPLES)
BICUBIC = T.InterpolationMode.BICUBIC
SIZES = [(320, 240), (500, 375), (375, 500), (90, 400), (64, 64)]


def keys_of(count, seed=0):
    return image_keys(seed, np.zeros(count, np.int64), np.arange(count))


def ks_distance(a, b):
    points = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_crops_are_those_of_random_resized_crop(size, scale):
    torch.manual_seed(0)
    blank = Image.new("L", size)
    theirs = [T.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(SAMPLES)]
    top, left, height, width = np.array(theirs).T
    ours = random_crops(np.tile(size, (SAMPLES, 1)), scale, keys_of(SAMPLES)).T
    for a, b in (
        (ours[2] - ours[0], width),
        (ours[3] - ours[1], height),
        ((ours[2] - ours[0]) * (ours[3] - ours[1]), width * height),
        ((ours[2] - ours[0]) / (ours[3] - ours[1]), width / height),
        (ours[0], left),
        (ours[1], top),
        (ours[0] + ours[2], 2 * left + width),
    ):
        assert ks_distance(a, b) < KS_MAX


def test_half_of_the_images_are_flipped_whatever_their_crop():
    flips, keys = random_flips(keys_of(SAMPLES)), keys_of(SAMPLES)
    left = random_crops(np.tile((320, 240), (SAMPLES, 1)), (0.2, 1.0), keys)[:, 0]
    error = math.sqrt(0.25 / SAMPLES)
    assert abs(flips.mean() - 0.5) < 4 * error
    assert abs(flips[left > np.median(left)].mean() - flips[left <= np.median(left)].mean()) < 4 * 2 * error


def test_jitter_draws_the_factors_and_orders_of_color_jitter():
    torch.manual_seed(0)
    ranges = [[0.6, 1.4]] * 3
    theirs = [T.ColorJitter.get_params(*ranges, None) for _ in range(SAMPLES)]
    order = np.array([[i for i in p[0].tolist() if i < 3] for p in theirs])
    factors = np.array([p[1:4] for p in theirs])
    draws = jitter_steps(keys_of(SAMPLES), 0.4)
    steps, ours = draws["jitter_step"], draws["jitter_factor"]
    for kind in range(3):
        assert ks_distance(ours[steps == kind], factors[:, kind]) < KS_MAX
        for place in range(3):
            share = (order[:, place] == kind).mean(), (steps[:, place] == kind).mean()
            assert abs(share[0] - share[1]) < 4 * math.sqrt(2 * (1 / 3) * (2 / 3) / SAMPLES)


def photographs():
    """Smooth, sharp and noisy content, saved as JPEG as photographs are."""
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        waves = 127 + 100 * np.sin(np.stack([x / 9 + i, y / 7, (x + y) / 23], -1))
        waves[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 120)
        pixels = np.clip(waves + generator.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=92)
        yield Image.open(file).convert("RGB")


def test_a_crop_has_the_pixels_of_torchvision_s_resized_crop():
    images, view = list(photographs()) * 8, TokenizerView(112)
    draws = view.draw(np.array([image.size for image in images]), keys_of(len(images)))
    ours = cut_out(images, view, draws)["image"].numpy()
    for i, image in enumerate(images):
        left, top, right, bottom = draws["box"][i].tolist()
        theirs = F.resized_crop(image, top, left, bottom - top, right - left, [112, 112], BICUBIC)
        theirs = F.hflip(theirs) if draws["flip"][i] else theirs
        assert np.array_equal(theirs, ours[i])


@pytest.mark.parametrize(("size", "crop_pct"), [(112, 0.875), (96, 1.0)])
def test_the_evaluation_view_is_resize_and_center_crop(size, crop_pct):
    theirs = T.Compose([T.Resize(int(size / crop_pct), BICUBIC), T.CenterCrop(size), T.ToTensor()])
    for image in photographs():
        assert (EvalView(size, crop_pct)(image)["image"] - theirs(image)).abs().max() < 1e-6


def jittered(image, steps, factors):
    for kind, factor in zip(steps, factors, strict=True):
        image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[kind](image, factor)
    return image


@pytest.fixture(scope="module")
def jitter_case():
    images = [image.resize((64, 64)) for image in photographs()] * 6
    draws = jitter_steps(keys_of(len(images)), 0.4)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    steps, factors = draws["jitter_step"], draws["jitter_factor"]
    theirs = [np.asarray(jittered(*case)) for case in zip(images, steps.tolist(), factors.tolist(), strict=True)]
    return pixels, steps, factors, torch.from_numpy(np.stack(theirs))


def test_color_jitter_gives_torchvision_s_pixels(jitter_case):
    pixels, steps, factors, theirs = jitter_case
    assert torch.equal(color_jitter(pixels, steps, factors), theirs)
    assert not torch.equal(pixels, theirs)


def test_color_jitter_for_gpus_differs_by_a_level_a_step_at_most(jitter_case):
    pixels, steps, factors, theirs = jitter_case
    difference = (jitter_batched(pixels, steps, factors).int() - theirs.int()).abs()
    assert difference.max() <= 3 and (difference > 1).float().mean() < 1e-3


def test_the_student_sees_crop_then_jitter_then_normalization():
    image = next(photographs())
    view = PretrainView(64, 64, (4, 4), 6, 2)
    draws = view.draw(np.array([image.size]), np.array([9], np.uint64))
    left, top, right, bottom = draws["box"][0].tolist()
    cut = image.crop((left, top, right, bottom))
    theirs = cut_out([cut], TokenizerView(64), {"box": np.array([[0, 0, *cut.size]]), "flip": draws["flip"]})["image"]
    theirs = jittered(Image.fromarray(theirs[0].numpy()), draws["jitter_step"][0], draws["jitter_factor"][0])
    normalize = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    torch.testing.assert_close(view(image, 9)["student"], normalize(theirs), atol=1e-5, rtol=0)
