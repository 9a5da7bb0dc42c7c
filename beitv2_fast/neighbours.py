"""k nearest neighbours: the class of an image by those of the training images whose features are most like its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07


@torch.no_grad()
def nearest(
    train: Tensor, queries: Tensor, k: int, *, block: int = 16384, query_block: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k training features with the largest cosine for each query.

    The similarities are computed in blocks of ``query_block`` x ``block``; of each the best k are merged with those so
    far, so memory does not grow with the product of the numbers of images.

    Args:
        train: [N, C]. queries: [M, C], on the device that shall compute.

    Returns:
        cosines and indices [M, min(k, N)], the largest first.
    """
    k = min(k, len(train))
    cosines, indices = [], []
    for rows in F.normalize(queries.float(), dim=1).split(query_block):
        best = rows.new_full((len(rows), 0), 0.0)
        found = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for first in range(0, len(train), block):
            part = F.normalize(train[first : first + block].to(rows.device).float(), dim=1)
            values, where = (rows @ part.T).topk(min(k, len(part)), dim=1)
            best, found = torch.cat([best, values], 1), torch.cat([found, where + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            found = found.gather(1, order)
        cosines.append(best)
        indices.append(found)
    return torch.cat(cosines), torch.cat(indices)


def one_an_image(features: Tensor, query: Tensor, patches: int, count: int) -> list[dict[str, int | float]]:
    """The patches with the largest cosine to a query, at most one an image: ``image``, ``patch``, ``cosine`` of each.

    Looked for among the ``16 * count`` nearest patches, so there may be fewer than ``count``.

    Args:
        features: of every patch, image after image [images * patches, C]. query: [C].
    """
    cosines, found = nearest(features, query[None], 16 * count)
    best: dict[int, dict[str, int | float]] = {}
    for at, cosine in zip(found[0].tolist(), cosines[0].tolist(), strict=True):
        image, patch = divmod(at, patches)
        best.setdefault(image, {"image": image, "patch": patch, "cosine": cosine})
    return list(best.values())[:count]


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
