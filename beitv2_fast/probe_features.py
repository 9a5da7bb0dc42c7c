"""The features that the probes read: computed once for every image, kept beside the run, shared by all probes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import atomically, read_weights, save_weights
from .data import EvalView, ImageFolder, ImageList, choose_loader, eval_loader
from .distributed import World
from .features import features
from .student import Student

KINDS = {"cls": "CLS token", "mean": "mean of patches"}  # of the whole model, in the order of ``student_features``
Features = dict[str, Tensor]  # by split


def student_features(model: Student, layers: Sequence[int] = ()) -> Callable[[Tensor], Tensor]:
    """Images [B, 3, H, W] in [0, 1] -> global features [B, 2 + 2 layers, C].

    First the CLS token of the aggregation branch and the mean of the last layer's patches, both normed, in the order of
    ``KINDS``; then for each block (counted from 1) its CLS token and the mean of its patches as they are. One forward
    gives them all.
    """

    def found(images: Tensor) -> Tensor:
        tokens: dict[int, Tensor] = {}
        hooks = [
            model.blocks[layer - 1].register_forward_hook(lambda _, given, out, at=layer: tokens.update({at: out}))
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
    """Of the columns of ``student_features``."""
    return [*KINDS.values(), *(f"{title}, block {layer}" for layer in layers for title in KINDS.values())]


class Extractor:
    """Runs a feature function over all splits. What it made lies in the run folder, so a stopped probe goes on there.

    Args:
        splits: the images. folder: for the files.
    """

    def __init__(self, splits: dict[str, ImageList], folder: Path, world: World, *, batch_size: int, workers: int):
        self.splits, self.folder, self.world = splits, folder, world
        self.device, self.batch_size, self.workers = world.device, batch_size, workers

    @torch.inference_mode()
    def __call__(self, name: str, size: int, function: Callable[[Tensor], Tensor], key: str = "") -> Features:
        """Features [N, ...] on the CPU by split.

        Args:
            size: of the images that the function reads. key: tells features apart that differ though all else is the
                same, such as the checkpoint; "": they are not kept.
        """
        return {split: self._split(name, split, size, function, key) for split in self.splits}

    def _split(self, name: str, split: str, size: int, function: Callable[[Tensor], Tensor], key: str) -> Tensor:
        from tqdm import tqdm

        images = self.splits[split]
        told = hashlib.sha256(f"{name}/{key}/{size}/{images.root}/{images.fingerprint}".encode()).hexdigest()[:16]
        file = self.folder / f"{split}_{told}.safetensors"
        if key and file.is_file():
            return read_weights(file)["features"]
        loader, _ = choose_loader("auto")
        dataset = ImageFolder(images, EvalView(size, 1.0), loader=loader, device=self.device)
        batches = eval_loader(dataset, self.batch_size, self.workers)
        bar = tqdm(batches, desc=f"{name} ({split})", unit="batch", leave=False, dynamic_ncols=True)
        found = torch.cat([function(b["image"].to(self.device)).float().cpu() for b in bar])
        if key and self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomically(file, lambda temporary: save_weights({"features": found}, temporary))
        return found
