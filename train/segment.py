"""Train a semantic segmentation: `deepspeed train/segment.py --preset base --data ADE20K --weights RUN_OR_FILE`.

Also under `torchrun` and plain `python`. Stopped and started again with the same options, it goes on where it was.
"""

from __future__ import annotations

import torch

from beitv2_fast.config import parse
from beitv2_fast.distributed import World, run_main, start
from beitv2_fast.engine import open_run, train
from beitv2_fast.errors import UserError
from beitv2_fast.run import RunFolder
from beitv2_fast.segmentation.config import SEGMENT, SegmentConfig
from beitv2_fast.segmentation.head import across_ranks
from beitv2_fast.segmentation.masks import validation_folders
from beitv2_fast.segmentation.task import (
    PolySchedule,
    SegmentTask,
    Validation,
    load_segmenter,
    start_segmenter,
    training_folder,
)


def evaluate_only(config: SegmentConfig, world: World) -> int:
    """--evaluate: the newest checkpoint."""
    folders = validation_folders(config.data, config.val)
    if folders is None:
        raise UserError(f"--evaluate: {config.data} has no images to evaluate on. Give --val.")
    model = load_segmenter(config.out)[0].to(world.device)
    run = RunFolder(config, world.rank)
    step = int(sorted(run.checkpoints.glob("step_*"))[-1].name.removeprefix("step_"))
    Validation(config, folders, model.config.num_classes, run, world)(step, {"weights": model}, lambda: None)
    run.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    config, local_rank = parse(SegmentConfig, SEGMENT, argv)
    world = start(config.device)
    deepspeed = local_rank is not None or config.deepspeed_config is not None
    if config.batch_size * world.size < 2:
        raise UserError("batch norm needs two images at a time. Give --batch-size 2, or start two ranks.")
    if config.evaluate:
        return evaluate_only(config, world)
    start_segmenter(config, config.num_classes or 2, lambda _: None)  # what does not fit is told before images are read
    run = open_run(config, world, deepspeed=deepspeed)
    dataset, num_classes = training_folder(config, run, world)
    plan = PolySchedule.of(config, len(dataset), world.size)
    torch.manual_seed(config.seed)
    model = across_ranks(start_segmenter(config, num_classes, run.print), world)
    validation, folders = None, validation_folders(config.data, config.val)
    if folders is not None:
        validation = Validation(config, folders, num_classes, run, world)
    else:
        run.print("no images to evaluate on: neither --val nor val, validation or test of --data")
    return train(
        SegmentTask(model, config.auxiliary_weight),
        config,
        dataset,
        run,
        world,
        deepspeed=deepspeed,
        layer_decay=config.layer_decay,
        after_epoch=None if validation is None else lambda *args: validation(*args, last=args[0] == plan.total_steps),
        every_epochs=config.eval_every,
        plan=plan,
    )


if __name__ == "__main__":
    run_main(main)
