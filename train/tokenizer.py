"""Train the VQ-KD tokenizer: ``python train/tokenizer.py --preset base --data IMAGES --out runs/tokenizer``.

Also under ``torchrun`` and ``deepspeed``. Stopped and started again with the same options, it goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from beitv2_fast.config.presets import TOKENIZER
from beitv2_fast.config.training import TokenizerConfig
from beitv2_fast.data.views import TokenizerView
from beitv2_fast.distributed import autocast_dtype, run_main
from beitv2_fast.downstream.tokenizer_quality import TokenizerValidation, at_size, validation_images
from beitv2_fast.errors import UserError
from beitv2_fast.models.tokenizer import Tokenizer
from beitv2_fast.pictures import token_map
from beitv2_fast.quantize.collapse import CollapseWatch
from beitv2_fast.teachers import create_teacher
from beitv2_fast.teachers.base import Teacher
from beitv2_fast.teachers.features import TeacherFeatures
from beitv2_fast.training.images import found_images, training_images
from beitv2_fast.training.launch import launched, open_run
from beitv2_fast.training.loop import train
from beitv2_fast.training.task import Batch, Task
from beitv2_fast.weights.build import build_tokenizer


class TokenizerTask(Task):
    name = "tokenizer"
    model: Tokenizer

    def __init__(self, model: Tokenizer, teacher: Teacher | TeacherFeatures, config: TokenizerConfig):
        self.model, self.teacher = model, teacher
        self.collapse = CollapseWatch(config.collapse_below, config.collapse_after)
        model.quantize.forwards_per_step = config.accumulate

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(self._view(batch["image"]), self._target(batch))
        return out.loss, {"rec_loss": out.rec_loss, "commit_loss": out.commit_loss}

    def prepare(self, micro_batches: list[Batch]) -> None:
        """The k-means that starts the codebook sees the vectors of all micro-batches."""
        with torch.no_grad():
            vectors = [self.model.features(self._view(batch["image"])) for batch in micro_batches]
        self.model.quantize.start(torch.cat(vectors))

    def inputs(self, batch: Batch) -> Batch:
        return {**batch, "target": self._target(batch)} if isinstance(self.teacher, TeacherFeatures) else batch

    def report(self) -> dict[str, Tensor]:
        return self.model.quantize.usage_tensors(reset=True)

    def warning(self, metrics: dict[str, float], steps: int) -> str | None:
        return self.collapse.look(metrics["used_codes"], steps)

    def line(self, metrics: dict[str, float]) -> str:
        return (
            f"similarity to the teacher {1 - metrics['rec_loss']:.3f}  codes used {metrics['used_codes']:.0%}  "
            f"perplexity {metrics['perplexity']:.0f}"
        )

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        image = self._view(batch["image"][:1])
        codes = self.model.encode(image).view(self.model.grid)
        return {"image": image[0], "tokens": token_map(codes, self.model.patch_size)}

    def _target(self, batch: Batch) -> Tensor:
        if "target" in batch:
            return batch["target"]
        if isinstance(self.teacher, TeacherFeatures):
            return self.teacher(batch["view"], batch["index"])
        return self.teacher(batch["image"], self.model.grid)

    def _view(self, images: Tensor) -> Tensor:
        """The tokenizer may read a smaller version of the crop that the teacher reads."""
        return at_size(images, self.model.config.encoder.image_size)


def main(argv: list[str] | None = None) -> int:
    config, world, backend = launched(TokenizerConfig, TOKENIZER, argv)
    torch.manual_seed(config.seed)
    side = config.image_size // config.patch_size
    if config.teacher_cache and not config.views:
        raise UserError("--teacher-cache keeps the features of a number of --views, and --views is 0: give at least 1.")
    # On a CPU that is slow at bf16 products the teacher, which keeps no activations, is faster in fp32.
    precision = autocast_dtype(config.precision, world.device) and autocast_dtype("auto", world.device)
    teacher = create_teacher(
        config.teacher, (side, side), config.teacher_weights, dtype=precision, resize=config.teacher_resize
    )
    model = build_tokenizer(config, teacher.dim)
    run = open_run(config, world, backend)
    evaluated = validation_images(config)
    if evaluated is not None:
        found_images(*evaluated, run, world, name="_val")  # what is missing is told before all images are checked
    teacher.to(world.device)
    view = TokenizerView(config.teacher_image_size or config.image_size, config.crop_scale)
    images = training_images(config, view, run, world)
    if config.views:
        images.views = config.views
        features = TeacherFeatures(
            config.teacher_cache or run.path / "teacher_features",
            images,
            lambda batch: teacher(batch, model.grid),
            world,
            shape=(side * side, teacher.dim),
            identity={"teacher": config.teacher, "weights": teacher.fingerprint(), "grid": model.grid},
            memo=run.path / "image_hashes.json",
            batch_size=config.batch_size,
            workers=config.workers,
        )
        # From here on only the tokenizer looks at the images: the same crops at its own size.
        images.view = replace(view, size=config.image_size)
    task = TokenizerTask(model, features if config.views else teacher, config)
    validation = None
    if evaluated is not None:
        validation = TokenizerValidation(config, model, teacher, run, world)
    return train(task, config, images, run, world, backend, after_epoch=validation, every_epochs=config.eval_every)


if __name__ == "__main__":
    run_main(main)
