"""k nearest neighbors: the same as with the whole matrix of similarities, whatever the blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beitv2_fast.downstream.probes.knn import knn_predict
from beitv2_fast.models.features import nearest


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("block", "query_block"), [(7, 5), (16, 100), (1000, 1)])
def test_blocks_find_the_nearest_of_all(block, query_block):
    train, queries = features(50, 0), features(23, 1)
    similarity = F.normalize(queries, dim=1) @ F.normalize(train, dim=1).T
    wanted = similarity.topk(10, dim=1)
    cosines, indices = nearest(train, queries, 10, block=block, query_block=query_block)
    assert torch.equal(indices, wanted.indices)
    torch.testing.assert_close(cosines, wanted.values, rtol=1e-5, atol=1e-6)


def test_votes_are_weighted_by_the_exponential_of_the_cosine():
    train, queries = features(40, 2), features(30, 3)
    labels = torch.arange(40) % 4
    found = knn_predict(train, labels, queries, 4, (1, 10, 20), temperature=0.07)
    differ = 0
    for i, query in enumerate(F.normalize(queries.double(), dim=1)):
        cosines = F.normalize(train.double(), dim=1) @ query
        order = cosines.argsort(descending=True).tolist()
        for k, predicted in found.items():
            votes = [0.0] * 4
            for j in order[:k]:
                votes[labels[j]] += torch.exp(cosines[j] / 0.07).item()
            assert predicted[i] == votes.index(max(votes))
            counts = torch.bincount(labels[order[:k]], minlength=4)
            differ += int(counts[predicted[i]] < counts.max())
    assert differ > 0  # the weights decide, not the numbers


def test_more_neighbors_than_images_are_all_of_them():
    train = features(5, 4)
    cosines, indices = nearest(train, train, 20)
    assert cosines.shape == (5, 5) and indices[:, 0].tolist() == list(range(5))
    assert knn_predict(train, torch.arange(5), train, 5, (1,))[1].tolist() == list(range(5))
