"""How well a classifier names images: top-1 and top-5, also of a folder with only some of its classes."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.draws import rank_share
from ..data.find import splits_in
from ..data.images import ImageFolder, ImageList
from ..data.loaders import keyed_loader
from ..distributed import World
from ..errors import UserError, first_few
from ..models.vit import normalize


def listed_classes(file: Path) -> list[str]:
    """The classes of a text file with one name per line: UTF-8, or UTF-16 with its mark at the start.

    Raises:
        UserError: it is no such text, names no class, or one twice.
    """
    content = file.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file} is no UTF-8 text (line {line}: {error.reason}). Save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{file} is no UTF-8 text (it has zero bytes). Save it as UTF-8.")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        found = f"the classes {', '.join(twice[:8])} more than once" if twice else "no class"
        raise UserError(
            f"{file} names {found}. It needs every class once, one name per line, in the classifier's order."
        )
    return names


def columns_of(images: ImageList, classes: Sequence[str], source: Path | str) -> Tensor:
    """The logits among which a classifier chooses, in the order of the images' labels: int64.

    Classes are found by their names. Tar shards have the training's numbers for these: all logits.
    """
    if images.spans is None or images.classes != [str(i) for i in range(len(images.classes))]:
        splits = [name for names in splits_in(images.root).values() for name in names]
        if splits and not images.classes:
            raise UserError(f"{source} is divided into {', '.join(splits)}. Give the one to evaluate on, {source}/....")
        return class_columns(images.classes, classes, source)
    if not images.classes:
        raise UserError(
            f"{source}: no image of the shards has a label. Evaluation needs a KEY.cls next to each KEY.jpg."
        )
    if len(images.classes) > len(classes):
        raise UserError(
            f"{source} has an image of class {len(images.classes) - 1}, but the classifier knows 0 to "
            f"{len(classes) - 1}. The shards need the numbers of the training's classes."
        )
    return torch.arange(len(classes))


def class_columns(folder_classes: Sequence[str], classes: Sequence[str], folder: Path | str) -> Tensor:
    """For each class of a folder its number in the classifier: int64 [folder classes].

    ImageNet-A and ImageNet-R have 200 of ImageNet's 1000 classes, under the same names (wnids): a classifier chooses
    among those of the folder, as the reference does, which cuts the other rows out of the head.

    Raises:
        UserError: a class that the classifier does not know.
    """
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in folder_classes if name not in number]
    if not folder_classes or unknown:
        named = f"the classes {first_few(unknown)}" if unknown else "no classes"
        raise UserError(
            f"{folder} has {named}, but the classifier knows {len(classes)}: {first_few(classes)}. Evaluation needs "
            "class folders under the training's names."
        )
    return torch.tensor([number[name] for name in folder_classes])


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module, dataset: ImageFolder, columns: Tensor, world: World, **how: Any
) -> dict[str, float]:
    """The shares of images whose class has the highest score (top1) and one of the five highest (top5), and the loss.

    The model is in eval mode meanwhile.

    Args:
        model: normalized images [B, 3, H, W] -> logits [B, classes]. All others: see ``evaluate_scores``.

    Returns:
        top1, top5 (1 with five classes or less), loss (mean cross entropy over those logits) and the number of images.
    """
    was_training = model.training
    model.eval()
    try:
        return evaluate_scores(lambda images: model(normalize(images))[:, None], dataset, columns, world, **how)[0]
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate_scores(
    scores: Callable[[Tensor], Tensor],
    dataset: ImageFolder,
    columns: Tensor,
    world: World,
    *,
    batch_size: int,
    workers: int = 0,
    amp: torch.dtype | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """What ``evaluate_classifier`` returns, of each of several classifiers.

    The images are divided among the ranks, each of which runs as many batches (a network whose weights are spread over
    them needs all in every forward).

    Args:
        scores: images [B, 3, H, W] in [0, 1] -> logits [B, classifiers, classes].
        dataset: labeled images with a view that gives "image" in [0, 1].
        columns: from ``class_columns``: the logits among which the model chooses, in the order of the labels.
        amp: dtype of autocast. progress: called after every batch.
    """
    own = rank_share(len(dataset), world.rank, world.size)
    most = -(-len(dataset) // world.size)
    keys = own + [(0, 0)] * (most - len(own))
    columns, sums, seen = columns.to(world.device), torch.zeros((), dtype=torch.float64, device=world.device), 0
    for batch in keyed_loader(dataset, keys, batch_size, workers):
        images, labels = batch["image"].to(world.device), batch["label"].to(world.device)
        with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
            logits = scores(images)
        real = max(min(len(own) - seen, len(labels)), 0)  # the rest fills up this rank's last batch
        seen += len(labels)
        sums = sums + _counts(logits[:real].float()[..., columns], labels[:real])
        progress()
    return [
        {"top1": top1 / images, "top5": top5 / images, "loss": loss / images, "images": int(images)}
        for images, loss, top1, top5 in world.sum(sums).tolist()
    ]


def _counts(scores: Tensor, labels: Tensor) -> Tensor:
    """[B, F, K], [B] -> float64 [F, 4]: images, sum of the cross entropy, right ones, ones with the label among the
    best five."""
    labels = labels[:, None].expand(scores.shape[:2])
    right = scores.topk(min(5, scores.shape[-1]), dim=-1).indices == labels[..., None]
    loss = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
    return torch.stack([torch.ones_like(loss), loss, right[..., 0], right.any(-1)], -1).double().sum(0)
