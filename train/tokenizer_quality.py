"""Codes in use and similarity to the teacher: `python train/tokenizer_quality.py --run RUN --data FOLDER --out RUN`.

On held-out images, FOLDER/test or FOLDER/val. One process is enough.
"""

from __future__ import annotations

import json

from beitv2_fast.build import load_run_model
from beitv2_fast.config import TokenizerConfig, parse
from beitv2_fast.data import EvalView, ImageFolder, choose_loader, eval_loader
from beitv2_fast.distributed import autocast_dtype, run_main, start
from beitv2_fast.engine import checked_images
from beitv2_fast.errors import UserError
from beitv2_fast.images import find_split
from beitv2_fast.run import RunFolder, read_config, write_atomically
from beitv2_fast.teachers import create_teacher
from beitv2_fast.tokenizer import Tokenizer
from beitv2_fast.tokenizer_quality import PRESETS, TokenizerQualityConfig, tokenizer_quality


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(TokenizerQualityConfig, PRESETS, argv)
    world = start(config.device)
    model, _ = load_run_model(config.run)
    if not isinstance(model, Tokenizer):
        raise UserError(f"--run {config.run} is no tokenizer's run folder. Name one that train/tokenizer.py made.")
    stored = read_config(TokenizerConfig, config.run)
    teacher = create_teacher(
        stored.teacher, model.grid, stored.teacher_weights, dtype=autocast_dtype("auto", world.device)
    )
    run = RunFolder(config, world.rank)
    split = find_split(config.data, "test", "val") or "test"
    images = checked_images(config.data, split, config, run, world, min_size=stored.patch_size)
    if len(images) > config.max_images:
        images = images.subset([i * len(images) // config.max_images for i in range(config.max_images)])
    view = EvalView(stored.teacher_image_size or stored.image_size, 1.0)
    folder = ImageFolder(images, view, loader=choose_loader("auto")[0], device=world.device)
    loader = eval_loader(folder, config.batch_size, config.workers)
    batches = (batch["image"].to(world.device) for batch in loader)
    found = tokenizer_quality(model.to(world.device), teacher.to(world.device), batches)
    write_atomically(run.path / "results.json", json.dumps(found, indent=2) + "\n")
    run.print(
        f"similarity to the teacher {found['similarity']:.3f}, codes used {found['used_codes']:.1%}, perplexity "
        f"{found['perplexity']:.0f} of {found['codes']}; {found['images']:,} images"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
