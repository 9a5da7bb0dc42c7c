"""Features of images from any of the models, and the nearest among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .classifier import Classifier
from .student import Student
from .tokenizer import Tokenizer
from .vit import normalize


class Features(NamedTuple):
    """cls [B, C]: of the whole image. patches [B, N, C]: of each patch, row by row."""

    cls: Tensor
    patches: Tensor


@torch.no_grad()
def features(model: Student | Classifier | Tokenizer, images: Tensor) -> Features:
    """What a model sees in images [B, 3, H, W] in [0, 1]; it normalizes them as the model expects.

    A student's: CLS of the aggregation branch (the last layer's without one) and patches of the last layer, each after
    the final norm (arXiv 2208.06366 section 3.3 probes the former). A classifier's: CLS of its last layer as it is, and
    its patches, whose mean it classifies. A tokenizer's: CLS of its encoder's last layer, and its encoder's normalized
    patches.
    """
    if isinstance(model, Tokenizer):
        tokens = model.encoder.forward_tokens(2 * images - 1)
        return Features(tokens[:, 0], model.encoder.fc_norm(tokens[:, 1:]))
    if isinstance(model, Classifier):
        tokens = model.forward_tokens(normalize(images))
        return Features(tokens[:, 0], tokens[:, 1:])
    last, aggregated = model.encode(normalize(images))
    norm, _ = model.aggregation_head
    return Features(norm((last if aggregated is None else aggregated)[:, 0]), model.norm(last[:, 1:]))


@torch.no_grad()
def block_tokens(model: Student | Classifier | Tokenizer, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The tokens after each of these blocks (counted from 1) as they are: CLS and patches, [B, 1 + N, C].

    ``images``: as of ``features``. Of a tokenizer its encoder's, of a student without its aggregation branch.
    """
    vit = model.encoder if isinstance(model, Tokenizer) else model
    x, bias = vit.embed(2 * images - 1 if isinstance(model, Tokenizer) else normalize(images)), vit.position_bias()
    found = {}
    for layer, block in enumerate(vit.blocks[: max(layers)], start=1):
        found[layer] = x = block(x, bias)
    return [found[layer] for layer in layers]


@torch.no_grad()
def classify(model: Classifier, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> probabilities [B, classes]."""
    logits: Tensor = model(normalize(images))
    return logits.softmax(-1)


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
