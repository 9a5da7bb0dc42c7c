"""The features that the probes read: computed once per image, kept with the run, shared by all probes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...data.draws import rank_share
from ...data.images import ImageFolder, ImageList
from ...data.loaders import choose_loader, keyed_loader
from ...data.views import EvalView
from ...distributed import World
from ...models.classifier import Classifier
from ...models.features import block_tokens, features
from ...models.student import Student
from ...models.tokenizer import Tokenizer
from ...runs.checkpoints import read_weights, save_weights
from ...runs.files import atomically

POOLED = {"cls": "CLS token", "mean": "mean of patches"}  # of the whole model, in the order of ``global_features``
ATTENDED = "attended patches"
SplitFeatures = dict[str, Tensor]  # by split


def global_features(model: Student | Classifier | Tokenizer, layers: Sequence[int] = ()) -> Callable[[Tensor], Tensor]:
    """Images [B, 3, H, W] in [0, 1] -> global features [B, 2 + 2 layers, C].

    First the CLS token and the mean of the patches that ``models.features`` gives, in the order of ``POOLED``: of a
    student the CLS token of the aggregation branch and the last layer's patches, both normed. Then for each block
    (counted from 1) its CLS token and the mean of its patches as they are. One forward gives them all.
    """
    blocks = model.encoder.blocks if isinstance(model, Tokenizer) else model.blocks

    def found(images: Tensor) -> Tensor:
        tokens: dict[int, Tensor] = {}
        hooks = [
            blocks[layer - 1].register_forward_hook(lambda _, given, out, at=layer: tokens.update({at: out}))
            for layer in layers
        ]
        try:
            cls, patches = features(model, images)
        finally:
            for hook in hooks:
                hook.remove()
        columns = [cls, patches.mean(1)]
        for layer in layers:
            columns += [tokens[layer][:, 0], tokens[layer][:, 1:].mean(1)]
        return torch.stack(columns, dim=1)

    return found


def feature_names(layers: Sequence[int]) -> list[str]:
    """Of the columns of ``global_features``."""
    return [*POOLED.values(), *(f"{title}, block {layer}" for layer in layers for title in POOLED.values())]


def read_features(
    model: Student | Classifier | Tokenizer, protocol: str, layers: Sequence[int]
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """What a protocol of the probe reads: its names, and images [B, 3, H, W] in [0, 1] -> features.

    sweep: ``global_features``. blocks: [B, layers, 2 C], a block's CLS token beside the mean of its patches, as they
    are (no layers given: of all blocks). concatenated: [B, 1, (layers + 1) C], the CLS tokens of these blocks (the last
    four) and the mean of the patches of the last of them, each after the model's final norm (a classifier has none on
    its tokens). attentive: the patches of ``models.features``, [B, N, C].
    """
    if protocol == "sweep":
        return feature_names(layers), global_features(model, layers)
    if protocol == "attentive":
        return [ATTENDED], lambda images: features(model, images).patches
    depth = len((model.encoder if isinstance(model, Tokenizer) else model).blocks)
    if protocol == "blocks":
        layers = layers or range(1, depth + 1)
        return [f"CLS token and mean of patches, block {layer}" for layer in layers], lambda images: torch.stack(
            [torch.cat([x[:, 0], x[:, 1:].mean(1)], 1) for x in block_tokens(model, images, layers)], 1
        )
    layers = layers or range(max(depth - 3, 1), depth + 1)
    norm: nn.Module = nn.Identity()
    if isinstance(model, Student | Tokenizer):
        norm = model.norm if isinstance(model, Student) else model.encoder.fc_norm

    def concatenated(images: Tensor) -> Tensor:
        tokens = [norm(x) for x in block_tokens(model, images, layers)]
        return torch.cat([*(x[:, 0] for x in tokens), tokens[-1][:, 1:].mean(1)], 1)[:, None]

    return [f"CLS tokens of blocks {', '.join(map(str, layers))} and mean of patches"], concatenated


class Extractor:
    """Runs a feature function over all splits. What it made lies in the run folder, so a stopped probe goes on there.

    The ranks share the images; rank 0 gets the features of all of them, writes them and fits classifiers to them.

    Args:
        splits: the images. folder: for the files.
    """

    def __init__(self, splits: dict[str, ImageList], folder: Path, world: World, *, batch_size: int, workers: int):
        self.splits, self.folder, self.world = splits, folder, world
        self.device, self.batch_size, self.workers = world.device, batch_size, workers

    @torch.inference_mode()
    def __call__(self, name: str, size: int, function: Callable[[Tensor], Tensor], key: str = "") -> SplitFeatures:
        """Features [N, ...] on the CPU by split, on rank 0; on the others nothing.

        Args:
            size: of the images that the function reads. key: tells features apart that differ though all else is the
                same, such as the checkpoint; "": they are not kept.
        """
        found = {split: self._split(name, split, size, function, key) for split in self.splits}
        return {split: features for split, features in found.items() if features is not None}

    def _split(self, name: str, split: str, size: int, function: Callable[[Tensor], Tensor], key: str) -> Tensor | None:
        images = self.splits[split]
        told = hashlib.sha256(f"{name}/{key}/{size}/{images.root}/{images.fingerprint}".encode()).hexdigest()[:16]
        file = self.folder / f"{split}_{told}.safetensors"
        first = self.world.rank == 0
        if self.world.first(int(bool(key) and file.is_file())):
            return read_weights(file)["features"] if first else None
        found = self._computed(f"{name} ({split})", images, size, function)
        if key and found is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomically(file, lambda temporary: save_weights({"features": found}, temporary))
        return found

    def _computed(
        self, title: str, images: ImageList, size: int, function: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        from tqdm import tqdm

        world, total = self.world, len(images)
        keys = rank_share(total, world.rank, world.size)
        keys += [(0, 0)] * (-(-total // world.size) - len(keys))  # the same batches everywhere; cut off below
        view = EvalView(size, 1.0)
        loader, _ = choose_loader("auto", images=images, view=view, device=self.device)
        dataset = ImageFolder(images, view, loader=loader, device=self.device)
        batches = keyed_loader(dataset, keys, self.batch_size, self.workers)
        found: Tensor | None = None
        done = 0
        hidden = world.rank > 0 or None
        for batch in tqdm(batches, desc=title, unit="batch", leave=False, dynamic_ncols=True, disable=hidden):
            own = function(batch["image"].to(self.device)).float()
            parts = world.gather(own)
            if world.rank == 0:
                rows = torch.stack(parts, 1).flatten(0, 1).cpu()  # rank r has the images r, r + ranks, ...
                if found is None:
                    found = rows.new_empty(total, *rows.shape[1:])
                found[done : done + len(rows)] = rows[: total - done]
                done += len(rows)
        return found
