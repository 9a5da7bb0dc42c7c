"""A training step (forward, backward, clipping, AdamW) of both trainings, ours and in the reference's structure.

The step is the training loop's without its data: the teacher's features and the codes are given, as the same numbers
to both; the codes may also be made in the step, by a frozen tokenizer in the same two forms. Both start from the same
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beitv2_fast.config.presets import PRETRAIN, TOKENIZER
from beitv2_fast.config.training import TokenizerConfig, TrainConfig
from beitv2_fast.kernels import masked_gather
from beitv2_fast.training.optim import adamw, parameter_groups
from beitv2_fast.weights.build import build_student, build_tokenizer
from bench import reference_structure
from bench.harness import DEVICE, OURS

REFERENCE = "reference implementation's structure"
STAGES = ("VQ-KD", "pre-training")
PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}
NUM_CODES, TEACHER_DIM, LR = 8192, 512, 1e-4


@dataclass
class Step:
    """A model, its optimizer and its batch; calling it trains a step and returns the loss."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    clip: float
    dtype: torch.dtype | None

    def forward(self) -> Tensor:
        with torch.autocast(DEVICE.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.loss()

    def __call__(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now, so that a step's peak counts its own gradients
        return loss.detach()


def steps(
    stage: str,
    batch: int,
    dtype: torch.dtype | None,
    config: TrainConfig | None = None,
    tokenizer: TokenizerConfig | None = None,
) -> dict[str, Step]:
    """The step of a stage by both implementations, on the same weights and batch; by default B/16 at 224.

    tokenizer: the shape of a frozen one, with random weights, that makes the labels of a pre-training step in it.
    """
    torch.manual_seed(0)
    config = config or {"VQ-KD": TOKENIZER, "pre-training": PRETRAIN}[stage]["base"]
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=DEVICE)
    if stage == "VQ-KD":
        ours = build_tokenizer(config, TEACHER_DIM).to(DEVICE).train()
        other = reference_structure.Tokenizer(ours.config)
        ours.quantize.codebook.copy_(_codes_near(ours, images))
        ours.quantize.initialized.fill_(True)
        target = torch.randn(batch, ours.grid[0] * ours.grid[1], TEACHER_DIM, device=DEVICE)
        losses = [lambda: ours(images, target).loss, lambda: other(images, target)]
    else:
        ours = build_student(config, NUM_CODES).to(DEVICE).train()
        other = reference_structure.Student(ours.config)
        patches = ours.grid[0] * ours.grid[1]
        mask = torch.rand(batch, patches, device=DEVICE).argsort(1) < config.num_masked
        labels = torch.randint(0, NUM_CODES, (batch * config.num_masked,), device=DEVICE)
        losses = [
            lambda: ours(images, mask, labels, config.num_masked).loss,
            lambda: other(images, mask, labels),
        ]
        if tokenizer is not None:
            encoders = _frozen_tokenizers(tokenizer, images, dtype)

            def labeled() -> Tensor:
                codes = encoders[0].encode(images)
                made = masked_gather(codes[..., None], mask, num_masked=config.num_masked)[:, 0]
                return ours(images, mask, made, config.num_masked).loss

            losses = [labeled, lambda: other(images, mask, encoders[1].encode(images)[mask])]
    reference_structure.same_weights(other, ours).to(DEVICE).train()
    groups = [parameter_groups(model, config.weight_decay) for model in (ours, other)]
    plain = [{k: v for k, v in group.items() if k != "names"} for group in groups[1]]
    optimizers = [adamw(groups[0], config), torch.optim.AdamW(plain, betas=config.betas, eps=1e-8)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = LR
    return {
        name: Step(model, loss, optimizer, config.clip_grad, dtype)
        for name, model, loss, optimizer in zip((OURS, REFERENCE), (ours, other), losses, optimizers, strict=True)
    }


def _frozen_tokenizers(
    config: TokenizerConfig, images: Tensor, dtype: torch.dtype | None
) -> tuple[nn.Module, nn.Module]:
    """Ours and the reference's structure, with the same weights and a codebook that fits the images."""
    ours = build_tokenizer(config, TEACHER_DIM).to(DEVICE).eval()
    ours.quantize.codebook.copy_(_codes_near(ours, images))
    other = reference_structure.same_weights(reference_structure.Tokenizer(ours.config), ours).to(DEVICE).eval()
    return ours.frozen(dtype), other.requires_grad_(False)


@torch.no_grad()
def _codes_near(tokenizer: nn.Module, images: Tensor) -> Tensor:
    """A codebook [K, D] scattered around the vectors of a batch, as after k-means: many codes are in use."""
    vectors = tokenizer.features(images[:1]).flatten(0, 1)
    shape = tokenizer.quantize.codebook.shape
    chosen = vectors[torch.randint(0, len(vectors), (shape[0],), device=vectors.device)]
    return nn.functional.normalize(chosen + 0.3 * vectors.std() * torch.randn(shape, device=vectors.device), dim=-1)
