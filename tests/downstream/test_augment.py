"""Fine-tuning's augmentation of batches: chances, targets, repeatability."""

from __future__ import annotations

import math

import pytest
import torch

from beitv2_fast.downstream.augment import BatchAugment


def batch(count=8, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 4


def test_targets_are_distributions_with_the_mass_of_the_two_mixed_labels():
    images, labels = batch()
    torch.manual_seed(0)
    for _ in range(10):
        mixed, targets = BatchAugment(10, erasing=0.0)(images, labels)
        assert mixed.shape == images.shape and targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        own = targets.gather(1, labels[:, None])[:, 0] - 0.01
        other = targets.gather(1, labels.roll(1)[:, None])[:, 0] - 0.01
        torch.testing.assert_close(own + other, torch.full((8,), 0.9))


def test_without_mixing_targets_are_smoothed_labels_and_images_stay():
    images, labels = batch()
    same, targets = BatchAugment(10, mixup=0, cutmix=0, erasing=0)(images, labels)
    assert torch.equal(same, images)
    assert targets[3].tolist() == pytest.approx([0.01, 0.01, 0.01, 0.91] + [0.01] * 6)


def test_mixup_blends_and_cutmix_replaces_a_rectangle():
    images, labels = batch()
    torch.manual_seed(1)
    mixed, targets = BatchAugment(4, cutmix=0, smoothing=0, erasing=0)(images, labels)
    share = targets[0, labels[0]]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    cut, targets = BatchAugment(4, mixup=0, smoothing=0, erasing=0)(images, labels)
    kept = (cut == images).all(1)  # [B, H, W]
    assert torch.equal(cut, torch.where(kept[:, None], images, images.roll(1, 0)))
    torch.testing.assert_close(kept[0].float().mean(), targets[0, labels[0]])


def test_a_quarter_of_the_images_is_erased_in_a_rectangle_of_noise():
    images, labels = torch.zeros(1200, 3, 16, 16), torch.zeros(1200, dtype=torch.int64)
    torch.manual_seed(0)
    erased, _ = BatchAugment(4, mixup=0, cutmix=0)(images, labels)
    hit = (erased != 0).flatten(1).any(1)
    assert abs(hit.float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1200)
    noise = erased[erased != 0]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_the_same_seed_repeats_a_batch():
    images, labels = batch()
    augment, results = BatchAugment(4), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(augment(images, labels))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("options", [{"mixup": -1}, {"cutmix_share": 2}, {"smoothing": -0.1}, {"erasing": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BatchAugment(10, **options)
