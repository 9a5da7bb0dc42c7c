"""k nearest neighbors while a student trains: whether its features come to tell classes apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...config.training import PretrainConfig
from ...distributed import World, autocast_dtype
from ...models.student import Student
from ...runs.folder import RunFolder
from ...runs.logs import is_best
from .features import POOLED, Extractor, global_features
from .images import find_labeled
from .knn import knn_predict

NEIGHBORS = (10, 20)
FIRST = f"_{NEIGHBORS[0]}"  # ends the names of the accuracies that decide which weights are the best


class KnnValidation:
    """After an epoch: top-1 of the test images of --knn-data by the labels of their nearest training images, for the
    CLS token and the mean of the patches, as a line of the log and of evaluation.jsonl; and whether the better of them
    is the best so far.
    """

    def __init__(self, config: PretrainConfig, student: Student, run: RunFolder, world: World) -> None:
        self.config, self.student, self.run, self.world = config, student, run, world
        assert config.knn_data is not None
        splits = find_labeled(config.knn_data, config, run, world, config.patch_size)
        self.labels = {split: torch.tensor(images.labels) for split, images in splits.items()}
        self.best: str | None = None
        self.extract = Extractor(splits, run.path, world, batch_size=config.batch_size, workers=config.workers)

    def __call__(self, step: int, models: dict[str, nn.Module], progress: Callable[[], None]) -> dict[str, float]:
        """The accuracies, on rank 0; nothing on the others."""
        compute, amp = global_features(self.student), autocast_dtype(self.config.precision, self.world.device)

        def function(images: Tensor) -> Tensor:
            progress()
            with torch.autocast(self.world.device.type, amp or torch.bfloat16, enabled=amp is not None):
                return compute(images)

        self.student.eval()
        try:
            found = self.extract("k-NN", self.config.image_size, function)
        finally:
            self.student.train()
        accuracies = {} if self.world.rank else self._told(step, found)
        score = max((value for name, value in accuracies.items() if name.endswith(FIRST)), default=0.0)
        better = self.world.first(int(is_best(self.run.path, step, score, FIRST)))  # rank 0 wrote its lines
        self.best = "weights" if better else None
        return accuracies

    def _told(self, step: int, found: dict[str, Tensor]) -> dict[str, float]:
        accuracies: dict[str, float] = {}
        for i, name in enumerate(POOLED):
            accuracies |= {f"knn_{name}_{k}": value for k, value in self._top1(found, i).items()}
        told = "  ".join(f"{name} {accuracies[f'knn_{name}_{NEIGHBORS[0]}']:.2%}" for name in POOLED)
        self.run.print(f"{NEIGHBORS[0]}-NN  step {step}  {told}  {len(self.labels['test']):,} images")
        self.run.metrics(step, accuracies, "evaluation.jsonl")
        return accuracies

    def _top1(self, found: dict[str, Tensor], column: int) -> dict[int, float]:
        train, test = (found[split][:, column] for split in ("train", "test"))
        labels, device = self.labels, self.world.device
        classes = int(labels["train"].max()) + 1
        predicted = knn_predict(train, labels["train"].to(device), test.to(device), classes, NEIGHBORS)
        return {k: (p.cpu() == labels["test"]).double().mean().item() for k, p in predicted.items()}
