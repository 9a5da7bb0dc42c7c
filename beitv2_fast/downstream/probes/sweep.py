"""Linear classifiers by SGD on cached features: several features and learning rates at once, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import VALIDATION_SHARE

MOMENTUM = 0.9


@dataclass(frozen=True)
class SweepResult:
    """A feature's classifier: the learning rate that did best on images held out of train, and what it does on test."""

    features: str
    lr: float
    held_out: float  # top-1 there
    top1: float
    top5: float | None  # None with five classes or less, where it is always 1


@dataclass(frozen=True)
class Classifiers:
    """weight [F, R, K, C] and bias [F, R, K] for features standardized by mean and std [F, C]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features [B, F, C] -> scores [F, R, B, K]."""
        return _scores((x.float() - self.mean) / self.std, self.weight, self.bias)


def _scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.transpose(0, 1)[:, None]  # [B, F, C] -> [F, 1, B, C]
    return rows @ weight.transpose(2, 3) + bias[:, :, None]


def fit_sgd(
    features: Tensor, labels: Tensor, num_classes: int, rates: Tensor, *, epochs: int, batch_size: int, seed: int = 0
) -> Classifiers:
    """Softmax regression on features standardized over the images, by SGD with momentum 0.9 and a cosine to 0.

    All classifiers see the same batches: one read of the features serves them all. None of them influences another.

    Args:
        features: [N, F, C], on any device. labels: [N] int64. rates: [F, R], the peak learning rates of the R
            classifiers of each feature, for a batch of 256 and scaled in proportion; their device computes.
        batch_size: at most; small sets are cut into ten batches.
    """
    device, (n, kinds, width) = rates.device, features.shape
    mean, std = _moments(features, device)
    weight = torch.zeros(kinds, rates.shape[1], num_classes, width, device=device)
    bias = torch.zeros(kinds, rates.shape[1], num_classes, device=device)
    state = [(weight, torch.zeros_like(weight)), (bias, torch.zeros_like(bias))]
    batch_size = max(min(batch_size, n // 10), 1)
    steps, generator = -(-n // batch_size), torch.Generator().manual_seed(seed)
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(n, generator=generator)
        rows = order[step % steps * batch_size :][:batch_size]
        x = (features[rows].to(device).float() - mean) / std
        # The gradient of the mean cross entropy: (softmax - one-hot)^T x / B.
        error = _scores(x, weight, bias).softmax(-1)
        error -= F.one_hot(labels[rows].to(device), num_classes)
        error /= len(rows)  # [F, R, B, K]
        gradients = error.transpose(2, 3) @ x.transpose(0, 1)[:, None], error.sum(2)
        lr = rates * (batch_size / 256) * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
        for (value, velocity), gradient in zip(state, gradients, strict=True):
            velocity.mul_(MOMENTUM).add_(gradient)
            value.sub_(lr.view(*lr.shape, *[1] * (value.dim() - 2)) * velocity)
    return Classifiers(weight, bias, mean, std)


def _moments(features: Tensor, device: torch.device, block: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the images, [F, C] each, in blocks and in float64."""
    total = torch.zeros(2, *features.shape[1:], dtype=torch.float64, device=device)
    for part in features.split(block):
        part = part.to(device).double()
        total += torch.stack([part.sum(0), part.square().sum(0)])
    mean, square = total / len(features)
    std = (square - mean.square()).clamp(min=0).sqrt()
    return mean.float(), std.float().clamp(min=1e-6)


def shares(classifiers: Classifiers, features: Tensor, labels: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """top-1 and top-5 of each classifier: [F, R] float64 each."""
    right = torch.zeros((), dtype=torch.float64)
    for rows, wanted in zip(features.split(block), labels.split(block), strict=True):
        scores = classifiers(rows.to(classifiers.weight.device))
        best = scores.topk(min(5, scores.shape[-1]), dim=-1).indices  # [F, R, B, 5]
        hits = best == wanted.to(best.device)[:, None]
        right = right + torch.stack([hits[..., 0].sum(-1), hits.sum((-1, -2))]).double()
    top1, top5 = right / len(labels)
    return top1, top5


def fit_sweep(
    names: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> tuple[list[SweepResult], Classifiers]:
    """Top-1 and top-5 on test of a linear classifier of each feature.

    The learning rate of a feature is the best on a fifth of the training images, held out; its classifier is then
    fitted on all of them. Test labels are used only for the final numbers.

    Args:
        names: of the F features. train, test: (features [N, F, C], labels [N] int64).

    Returns:
        the results by feature, and the classifiers [F, 1, ...] that were tested.
    """
    (x, labels), (x_test, test_labels) = train, test
    num_classes = int(torch.cat([labels, test_labels]).max()) + 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, fit = order.tensor_split([max(round(len(x) * VALIDATION_SHARE), 1)])
    how = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    rates = torch.tensor(learning_rates, device=device).expand(len(names), -1)
    trial = fit_sgd(x[fit], labels[fit], num_classes, rates, **how)
    held_out, _ = shares(trial, x[held], labels[held])
    best = held_out.argmax(1)
    chosen = rates.gather(1, best[:, None])
    final = fit_sgd(x, labels, num_classes, chosen, **how)
    top1, top5 = (share[:, 0].tolist() for share in shares(final, x_test, test_labels))
    results = [
        SweepResult(name, rate, held_out[i, best[i]].item(), top1[i], top5[i] if num_classes > 5 else None)
        for i, (name, rate) in enumerate(zip(names, [learning_rates[i] for i in best.tolist()], strict=True))
    ]
    return results, final
