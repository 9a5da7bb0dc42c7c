"""Linear probe: how much of a label a linear classifier reads off frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

L2_GRID = tuple(10.0**e for e in range(-5, 2))
VALIDATION_SHARE = 0.2


class Score(NamedTuple):
    """A balanced accuracy, and its standard error by the number of test images."""

    accuracy: float
    error: float


def balanced_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> Score:
    """Mean over classes of the share r of a class's n images that are recognized; classes without images are left out.

    Its standard error is ``sqrt(sum of r (1 - r) / n) / classes``: the images of each class are a sample.
    """
    total = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    present = total > 0
    total = total[present]
    shares = right[present] / total
    return Score(shares.mean().item(), (shares * (1 - shares) / total).sum().sqrt().item() / len(total))


@dataclass(frozen=True)
class ProbeResult:
    """A probe's scores, one per seed."""

    scores: list[Score]

    @property
    def runs(self) -> list[float]:
        return [score.accuracy for score in self.scores]

    @property
    def mean(self) -> float:
        return sum(self.runs) / len(self.runs)

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1 in the denominator)."""
        return torch.tensor(self.runs, dtype=torch.float64).std().item() if len(self.runs) > 1 else 0.0

    @property
    def error(self) -> float:
        """The largest standard error by the number of test images: they are the same for all seeds."""
        return max(score.error for score in self.scores)


def fit_linear(x: Tensor, labels: Tensor, num_classes: int, l2: float) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardized features, classes weighted equally, by L-BFGS.

    Args:
        x: [N, F]. labels: [N] int64. l2: weight of ``||W||^2 / 2``, which is added to the mean cross entropy.

    Returns:
        a function from features [M, F] to scores [M, num_classes].
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / std
    counts = torch.bincount(labels, minlength=num_classes).double()
    class_weight = len(labels) / (counts.clamp(min=1) * (counts > 0).sum())
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels, class_weight) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    w, b = weight.detach(), bias.detach()
    return lambda features: F.linear((features.double() - mean) / std, w, b)


FEW_SHOT_L2 = 0.1  # there are too few images to choose it on


def few_shot(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, shots: int, seeds: Iterable[int]
) -> ProbeResult:
    """Balanced accuracies on test of linear classifiers that saw ``shots`` images per class, other ones for each seed.

    A class with fewer images gives all of them.

    Args:
        train: [N, F]; labels: [N] int64. test: [M, F]; test_labels: [M] int64.
    """
    num_classes, scores = int(torch.cat([labels, test_labels]).max()) + 1, []
    for seed in seeds:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[labels[order] == c][:shots] for c in range(num_classes)])
        predict = fit_linear(train[chosen], labels[chosen], num_classes, FEW_SHOT_L2)
        scores.append(balanced_accuracy(predict(test).argmax(-1), test_labels, num_classes))
    return ProbeResult(scores)


def linear_probe(
    features: Callable[[int], tuple[Tensor, Tensor]],
    train_labels: Tensor,
    test_labels: Tensor,
    seeds: Iterable[int],
) -> ProbeResult:
    """Balanced accuracy on the test images, once per seed.

    A seed splits the training images into 80 % to fit and 20 % to choose the L2 penalty; the classifier is then fitted
    again on all of them. Test labels are used only for the final number.

    Args:
        features: seed -> (train [N, F], test [M, F]); it may differ by seed, as for an untrained network.
    """
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    scores = []
    for seed in seeds:
        x, x_test = features(seed)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held, fit = order.tensor_split([round(len(x) * VALIDATION_SHARE)])

        def score(l2: float, x: Tensor = x, held: Tensor = held, fit: Tensor = fit) -> float:
            predict = fit_linear(x[fit], train_labels[fit], num_classes, l2)
            return balanced_accuracy(predict(x[held]).argmax(-1), train_labels[held], num_classes).accuracy

        predict = fit_linear(x, train_labels, num_classes, max(L2_GRID, key=score))
        scores.append(balanced_accuracy(predict(x_test).argmax(-1), test_labels, num_classes))
    return ProbeResult(scores)
