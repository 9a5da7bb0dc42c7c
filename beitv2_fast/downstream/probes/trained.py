"""Probes by AdamW on features of random crops, which the frozen network computes anew: linear classifiers, one for each
feature, or an attentive one. BEiT's protocol (arXiv 2106.08254) and what DINOv2 (arXiv 2304.07193) and CAPI (arXiv
2502.08769) read, in the training loop of all stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config.downstream import ProbeConfig
from ...config.training import TrainConfig
from ...data.images import ImageFolder, ImageList
from ...data.loaders import choose_loader
from ...data.views import EvalView, TokenizerView, View
from ...distributed import World, autocast_dtype
from ...runs.checkpoints import latest_weights, load_model, read_weights
from ...runs.folder import RunFolder
from ...training.loop import train
from ...training.optim import TorchBackend
from ...training.task import Batch, Task
from ..classification import crop_share, top1_line
from ..evaluation import evaluate_scores
from .backbones import Backbone

INITIAL_STD = 0.01  # of the classifiers' weights, as BEiT's
HEAD_WIDTH = 64  # of the attention


class AttentivePool(nn.Module):
    """Patches [B, N, C] -> [B, 1, C]: ``softmax(q k^T / sqrt(c)) v`` of one learned query, keys and values linear in
    the patches, in heads of width c = 64 (one head if C is no multiple of it)."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, patches: Tensor) -> Tensor:
        kv = self.key_value(patches).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [2, B, h, N, c]
        query = self.query.view(1, self.heads, 1, -1).expand(len(patches), -1, -1, -1)
        return F.scaled_dot_product_attention(query, *kv).flatten(1)[:, None]


class ProbeHeads(nn.Module):
    """Features [B, F, C], or with ``attentive`` patches [B, N, C] and F = 1 -> logits [B, F, classes], in fp32."""

    def __init__(self, features: int, width: int, num_classes: int, attentive: bool = False):
        super().__init__()
        self.pool = AttentivePool(width) if attentive else nn.Identity()
        self.weight = nn.Parameter(INITIAL_STD * torch.randn(features, num_classes, width))
        self.bias = nn.Parameter(torch.zeros(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("bfc,fkc->bfk", self.pool(x.float()), self.weight) + self.bias


class ProbeTask(Task):
    """The sum over the classifiers of their mean cross entropies: none influences another."""

    name = "probe"

    def __init__(self, model: ProbeHeads, features: Callable[[Tensor], Tensor]):
        self.model, self.features = model, features

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = self.features(batch["image"])
        scores, labels = model(x), batch["label"][:, None]
        losses = F.cross_entropy(scores.transpose(1, 2), labels.expand(scores.shape[:2]), reduction="none").mean(0)
        return losses.sum(), {"accuracy": (scores.argmax(-1) == labels).float().mean(0).amax()}

    def line(self, metrics: dict[str, float]) -> str:
        return f"best classifier right {metrics['accuracy']:.1%}"


class ProbeValidation:
    """Top-1 and top-5 of every classifier on the test images: lines of the log, evaluation.jsonl, results.json, with
    a note from ``labels_seen``."""

    def __init__(
        self, config: ProbeConfig, backbone: Backbone, images: ImageList, run: RunFolder, world: World, note: str
    ):
        self.config, self.backbone, self.run, self.world, self.note = config, backbone, run, world, note
        size = backbone.image_size
        self.dataset = _dataset(images, EvalView(size, crop_share(None, size)), config, world)

    def __call__(self, step: int, models: dict[str, nn.Module], progress: Callable[[], None]) -> list[dict[str, float]]:
        heads, backbone, classes = models["weights"], self.backbone, self.dataset.images.classes
        found = evaluate_scores(
            lambda images: heads(backbone.features(images)), self.dataset, torch.arange(len(classes)), self.world,
            batch_size=self.config.batch_size, workers=self.config.workers,
            amp=autocast_dtype(TrainConfig.precision, self.world.device), progress=progress,
        )  # fmt: skip
        for name, result in zip(backbone.columns, found, strict=True):
            self.run.print(f"evaluation  step {step}  {name:<42} {top1_line(result, len(classes))}")
        top1 = {name: result["top1"] for name, result in zip(backbone.columns, found, strict=True)}
        self.run.metrics(step, top1, "evaluation.jsonl")
        rows = [
            {"features": f"{backbone.title}, {name}", "mean": value, "std": 0.0, "runs": [value], **result}
            for (name, value), result in zip(top1.items(), found, strict=True)
        ]
        self.run.results(
            {
                "backbone": backbone.title,
                "protocol": self.config.protocol,
                "task": f"which of {len(classes)} classes: {', '.join(classes[:10])}",
                "metric": "top-1 accuracy",
                "chance": 1 / len(classes),
                "step": step,
                "rows": rows,
                "notes": [self.note],
            }
        )
        return found


def train_probe(
    config: ProbeConfig, backbone: Backbone, splits: dict[str, ImageList], run: RunFolder, world: World, note: str
) -> int:
    """Train and evaluate the classifiers of --protocol; the exit code. A stopped run goes on."""
    validation = ProbeValidation(config, backbone, splits["test"], run, world, note)
    view = TokenizerView(backbone.image_size, (0.08, 1.0))
    dataset = _dataset(splits["train"], view, config, world)
    size = backbone.image_size
    width = backbone.features(torch.zeros(1, 3, size, size, device=world.device)).shape[-1]
    torch.manual_seed(config.seed)
    attentive = config.protocol == "attentive"
    heads = ProbeHeads(len(backbone.columns), width, len(dataset.images.classes), attentive)
    task = ProbeTask(heads, backbone.features)
    return train(task, loop_config(config), dataset, run, world, TorchBackend, after_epoch=validation)


def evaluate_probe(
    config: ProbeConfig, backbone: Backbone, splits: dict[str, ImageList], run: RunFolder, world: World, note: str
) -> int:
    """--evaluate: the classifiers of the newest checkpoint on the test images; the exit code."""
    file = latest_weights(run.path)
    state = read_weights(file)
    features, classes, width = state["weight"].shape
    heads = ProbeHeads(features, width, classes, config.protocol == "attentive")
    load_model(heads, state, str(file))
    step = int(file.parent.name.removeprefix("step_"))
    validation = ProbeValidation(config, backbone, splits["test"], run, world, note)
    validation(step, {"weights": heads.to(world.device)}, lambda: None)
    run.close()
    return 0


def loop_config(config: ProbeConfig) -> TrainConfig:
    """The training of BEiT's protocol: AdamW, learning rate for a batch of 256, cosine to 0 without a warm-up."""
    names = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(ProbeConfig)}
    same = {name: getattr(config, name) for name in names}
    return TrainConfig(**same, lr_batch=256, min_lr=0.0, warmup_epochs=0, clip_grad=0.0)


def _dataset(images: ImageList, view: View, config: ProbeConfig, world: World) -> ImageFolder:
    loader, _ = choose_loader("auto", images=images, view=view, device=world.device)
    return ImageFolder(images, view, config.seed, loader=loader, device=world.device)
