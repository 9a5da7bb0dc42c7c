"""k nearest neighbors as a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...models.features import nearest

TEMPERATURE = 0.07


def knn_predict(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    ks: Sequence[int] = (10, 20),
    *,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """For each k the class with the largest sum of ``exp(cosine / temperature)`` over the k nearest: int64 [M].

    Args:
        train: [N, C]. labels: [N] int64, theirs. queries: [M, C].
    """
    cosines, indices = nearest(train, queries, max(ks))
    votes = (cosines.double() / temperature).exp()
    chosen = labels.to(indices.device)[indices]
    result = {}
    for k in ks:
        scores = votes.new_zeros(len(queries), num_classes).scatter_add_(1, chosen[:, :k], votes[:, :k])
        result[k] = scores.argmax(1)
    return result
