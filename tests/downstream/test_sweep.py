"""Linear classifiers on cached features: each as if it were alone, the learning rate chosen without the test images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.downstream.probes.sweep import fit_sgd, fit_sweep, shares

CLASSES = 4
HOW = {"learning_rates": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "seed": 0, "device": "cpu"}


def problem(count: int = 200, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two features: one that tells the classes apart, at a scale of its own, and one that is noise."""
    generator = torch.Generator().manual_seed(seed)
    centers = 5 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % CLASSES
    good = 100 + 30 * (centers[labels] + torch.randn(count, width, generator=generator))
    return torch.stack([good, torch.randn(count, width, generator=generator)], 1), labels


def test_each_classifier_is_that_of_torch_s_own_sgd():
    x, labels = problem()
    rates = torch.tensor([[0.1, 0.7], [0.2, 0.01]])
    found = fit_sgd(x, labels, CLASSES, rates, epochs=3, batch_size=20, seed=5)
    for f in range(2):
        for r in range(2):
            rows = (x[:, f] - x[:, f].mean(0)) / x[:, f].std(0, correction=0)
            layer = torch.nn.Linear(8, CLASSES)
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
            optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
            generator = torch.Generator().manual_seed(5)
            for group in optimizer.param_groups:
                group["lr"] = schedule.base_lrs[0] = float(rates[f, r]) * 20 / 256
            for _ in range(3):
                for batch in torch.randperm(len(x), generator=generator).split(20):
                    optimizer.zero_grad()
                    F.cross_entropy(layer(rows[batch]), labels[batch]).backward()
                    optimizer.step()
                    schedule.step()
            torch.testing.assert_close(found.weight[f, r], layer.weight.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.bias[f, r], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_features_that_tell_the_classes_are_told_from_noise():
    good, noise = fit_sweep(["good", "noise"], problem(), problem(100, seed=1), epochs=20, batch_size=32, **HOW)[0]
    assert good.features == "good" and good.top1 > 0.95 and good.held_out > 0.9
    assert noise.top1 < 0.5 and noise.top5 is None  # of four classes five are always right


def test_top_5_is_told_of_more_than_five_classes_alone():
    x = torch.randn(60, 1, 8, generator=torch.Generator().manual_seed(0))
    few, many = (
        fit_sweep(["noise"], (x, labels), (x, labels), epochs=1, batch_size=60, **HOW)[0][0]
        for labels in (torch.arange(60) % 5, torch.arange(60) % 6)
    )
    assert few.top5 is None and many.top1 < many.top5 < 1


def test_the_chosen_rate_does_not_depend_on_the_test_images():
    x, labels = problem(seed=2)
    (one, _), (other, _) = (
        fit_sweep(["a", "b"], (x, labels), (x, tested), epochs=5, batch_size=200, **HOW)[0]
        for tested in (labels, labels.flip(0))
    )
    assert (one.lr, one.held_out) == (other.lr, other.held_out) and one.top1 != other.top1


def test_top_1_and_top_5_count_as_by_hand():
    x, _ = problem(60)
    labels = torch.arange(60) % 9
    classifiers = fit_sgd(x, labels, 9, torch.tensor([[0.1], [0.3]]), epochs=2, batch_size=20)
    top1, top5 = shares(classifiers, x, labels, block=7)
    scores = classifiers(x)
    for f in range(2):
        place = (scores[f, 0] > scores[f, 0].gather(1, labels[:, None])).sum(1)
        assert top1[f, 0].item() == pytest.approx((place == 0).double().mean().item())
        assert top5[f, 0].item() == pytest.approx((place < 5).double().mean().item())
    assert 0 < top1[1, 0] < top5[1, 0] < 1
