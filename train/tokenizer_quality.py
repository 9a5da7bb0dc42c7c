"""Codes in use and similarity to the teacher: ``python train/tokenizer_quality.py --run RUN --data FOLDER --out RUN``.

On held-out images, FOLDER/test or FOLDER/val. One process is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from beitv2_fast.config.downstream import TokenizerQualityConfig
from beitv2_fast.config.options import parse
from beitv2_fast.config.presets import PRESETS
from beitv2_fast.data.find import find_split
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import choose_loader, eval_loader
from beitv2_fast.data.views import EvalView
from beitv2_fast.distributed import autocast_dtype, run_main, start
from beitv2_fast.downstream.tokenizer_quality import measure, summary
from beitv2_fast.errors import UserError
from beitv2_fast.models.tokenizer import Tokenizer
from beitv2_fast.runs.folder import RunFolder
from beitv2_fast.teachers import create_teacher
from beitv2_fast.teachers.base import Teacher
from beitv2_fast.training.images import checked_images
from beitv2_fast.weights.create import open_model, tokenizer_config


@torch.no_grad()
def tokenizer_quality(model: Tokenizer, teacher: Teacher, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Looks at whole images once, in eval mode.

    Args:
        batches: images [B, 3, S, S] in [0, 1], as large as the teacher reads them; the tokenizer sees them at its size.

    Returns:
        see ``summary``.
    """
    model.eval()
    return summary(cast(Tensor, sum(measure(model, model, teacher, batch, len(batch)) for batch in batches)))


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(TokenizerQualityConfig, PRESETS, argv)
    world = start(config.device)
    model, _ = open_model(config.run)
    if not isinstance(model, Tokenizer):
        raise UserError(f"--run {config.run} is no tokenizer. Name the run folder of one, or a published one.")
    stored = tokenizer_config(config.run)
    teacher = create_teacher(
        stored.teacher,
        model.grid,
        stored.teacher_weights,
        dtype=autocast_dtype("auto", world.device),
        resize=stored.teacher_resize,
    )
    run = RunFolder(config, world.rank)
    split = find_split(config.data, "test", "val") or "test"
    images = checked_images(config.data, split, config, run, world, min_size=stored.patch_size)
    if len(images) > config.max_images:
        images = images.subset([i * len(images) // config.max_images for i in range(config.max_images)])
    view = EvalView(stored.teacher_image_size or stored.image_size, 1.0)
    chosen, _ = choose_loader("auto", images=images, view=view, device=world.device)
    folder = ImageFolder(images, view, loader=chosen, device=world.device)
    loader = eval_loader(folder, config.batch_size, config.workers)
    batches = (batch["image"].to(world.device) for batch in loader)
    found = tokenizer_quality(model.to(world.device), teacher.to(world.device), batches)
    run.results(found)
    run.print(
        f"similarity to the teacher {found['similarity']:.3f}, codes used {found['used_codes']:.1%}, perplexity "
        f"{found['perplexity']:.0f} of {found['codes']}; {found['images']:,} images"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
