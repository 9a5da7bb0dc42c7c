"""Pre-train the masked-image student: ``deepspeed train/pretrain.py --preset base --data IMAGES --tokenizer RUN``.

Also under ``torchrun`` and plain ``python``. Stopped and started again with the same options, it goes on where it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beitv2_fast.config.presets import PRETRAIN
from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.data.draws import patch_masks
from beitv2_fast.data.views import PretrainView
from beitv2_fast.distributed import autocast_dtype, run_main
from beitv2_fast.downstream.probes.images import found_labeled
from beitv2_fast.downstream.probes.validation import KnnValidation
from beitv2_fast.errors import UserError
from beitv2_fast.kernels import masked_gather
from beitv2_fast.models.student import Student
from beitv2_fast.models.tokenizer import Tokenizer
from beitv2_fast.pictures import masked_picture, token_map
from beitv2_fast.training.deepspeed import DeepSpeedBackend, zero_stage
from beitv2_fast.training.images import training_images
from beitv2_fast.training.launch import launched, open_run
from beitv2_fast.training.loop import train
from beitv2_fast.training.task import Batch, Task
from beitv2_fast.weights.build import build_student
from beitv2_fast.weights.create import open_model


class PretrainTask(Task):
    name = "pretrain"
    model: Student

    def __init__(self, model: Student, tokenizer: Tokenizer, config: PretrainConfig):
        self.model, self.tokenizer, self.num_masked = model, tokenizer, config.num_masked
        self.encode = torch.compile(tokenizer.encode) if config.compile else tokenizer.encode
        sizes = (config.num_masked, config.min_mask_patches, config.max_mask_patches)
        self.mask_settings = (config.mask, model.grid, *sizes)
        self.branches = ("mim", "agg")[: 2 if model.config.aggregation_depth else 1]
        self.weights = {"both": (1, 1), "last": (1, 0), "aggregation": (0, 1)}[config.loss_on]
        if config.loss_on == "aggregation" and len(self.branches) == 1:
            raise UserError("--loss-on aggregation needs that branch: give an --aggregation-depth above 0.")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = self._mask(batch)
        codes = self.encode(batch["tokenizer"])  # [B, N]
        labels = masked_gather(codes[..., None], mask, num_masked=self.num_masked)[:, 0]
        out = model(batch["student"], mask, labels, self.num_masked)
        metrics = {f"loss_{name}": loss for name, loss in zip(self.branches, out.losses, strict=True)}
        accuracy = out.correct / max(len(labels), 1)
        loss = out.loss
        if self.weights != (1, 1):  # a loss times 0 keeps its parameters in the graph, as ZeRO and DDP expect
            loss = sum(weight * loss for weight, loss in zip(self.weights, out.losses, strict=False))
        return loss, {**metrics, **{f"accuracy_{n}": a for n, a in zip(self.branches, accuracy, strict=True)}}

    def line(self, metrics: dict[str, float]) -> str:
        return "masked tokens right: " + ", ".join(f"{n} {metrics[f'accuracy_{n}']:.1%}" for n in self.branches)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        view = batch["tokenizer"][:1]
        codes = self.tokenizer.encode(view).view(self.tokenizer.grid)
        return {
            "masked": masked_picture(view[0], self._mask(batch)[0].view(self.model.grid)),
            "tokens": token_map(codes, self.tokenizer.patch_size),
        }

    def _mask(self, batch: Batch) -> Tensor:
        """[B, N] bool: the loader's, or with --masks device drawn here and now."""
        return batch["mask"] if "mask" in batch else patch_masks(batch["mask_key"], *self.mask_settings)


def load_tokenizer(config: PretrainConfig, dtype: torch.dtype | None) -> Tokenizer:
    tokenizer, _ = open_model(config.tokenizer, config.tokenizer_image_size)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"--tokenizer {config.tokenizer} holds a {type(tokenizer).__name__.lower()}, not a tokenizer.")
    grid = (config.image_size // config.patch_size,) * 2
    if tokenizer.grid != grid:
        raise UserError(
            f"the tokenizer in {config.tokenizer} cuts an image into {tokenizer.grid} patches, the student into "
            f"{grid}. Choose --image-size and --patch-size so that both have the same grid, or --tokenizer-image-size "
            f"{grid[0] * tokenizer.patch_size}, with which the tokenizer's positions are interpolated."
        )
    return tokenizer.frozen(dtype)


def main(argv: list[str] | None = None) -> int:
    config, world, backend = launched(PretrainConfig, PRETRAIN, argv)
    tokenizer = load_tokenizer(config, autocast_dtype(config.precision, world.device))
    torch.manual_seed(config.seed)
    model = build_student(config, tokenizer.num_codes)
    try:
        view = PretrainView(
            student_size=config.image_size,
            tokenizer_size=tokenizer.config.encoder.image_size,
            mask_grid=model.grid,
            num_masked=config.num_masked,
            min_mask_patches=config.min_mask_patches,
            crop_scale=config.crop_scale,
            color_jitter=config.color_jitter,
            mask_kind=config.mask,
            masks=config.masks,
            tokenizer_resample=config.tokenizer_interpolation,
            max_mask_patches=config.max_mask_patches,
            jitter_on=config.jitter_on,
        )
    except ValueError as error:
        raise UserError(f"{error}. Change one of these options.") from error
    if config.knn_data and backend is DeepSpeedBackend and zero_stage(config, world.device) == 3:
        raise UserError("--knn-data needs whole weights on every rank, and ZeRO 3 has none. Leave one of them out.")
    task = PretrainTask(model, tokenizer.to(world.device), config)
    run = open_run(config, world, backend)
    if config.knn_data:
        found_labeled(config.knn_data, run, world)  # what is missing is told before all images are checked
    images = training_images(config, view, run, world)
    knn = KnnValidation(config, model, run, world) if config.knn_data else None
    return train(task, config, images, run, world, backend, after_epoch=knn, every_epochs=config.knn_every)


if __name__ == "__main__":
    run_main(main)
