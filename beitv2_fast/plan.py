"""How many steps a training has, where its epochs end, and the learning rate of each step."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TrainConfig
from .optim import cosine_schedule
from .sampler import check_batch


@dataclass(frozen=True)
class Plan:
    """Steps and learning rate of a training: as many steps as it takes to see every image in every epoch.

    The epochs follow one another without a gap (see ``EpochSampler``), so only the last step may have images of one
    epoch more. The reference drops what is left of every epoch instead.
    """

    images: int
    images_per_step: int
    epochs: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    @classmethod
    def of(cls, config: TrainConfig, num_images: int, world_size: int) -> Plan:
        on_a_rank = config.batch_size * config.accumulate
        check_batch(num_images, on_a_rank, world_size)
        images = on_a_rank * world_size  # a step
        total = -(-config.epochs * num_images // images)
        warmup = min(round(config.warmup_epochs * num_images / images), total)
        return cls(
            num_images, images, config.epochs, total, warmup, config.lr * images / config.lr_batch, config.min_lr
        )

    def epoch(self, step: int) -> float:
        """How many epochs the first ``step`` steps are."""
        return min(step * self.images_per_step / self.images, self.epochs)

    def ended_epoch(self, step: int) -> int:
        """The number, from 1, of the epoch whose last image was in this step, the step-th from 1; 0 if there is none.

        No step has more images than an epoch.
        """
        before, now = ((k * self.images_per_step) // self.images for k in (step - 1, step))
        return now if now > before else 0

    def lr(self, step: int) -> float:
        return cosine_schedule(
            step,
            peak=self.peak_lr,
            final=min(self.min_lr, self.peak_lr),
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
        )
