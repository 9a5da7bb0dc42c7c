"""The images of a training: found, checked once for all ranks, and how they are loaded."""

from __future__ import annotations

from pathlib import Path

from ..config.options import RunConfig
from ..config.training import TrainConfig
from ..data.check import check_images
from ..data.find import find_images
from ..data.images import ImageFolder, ImageList
from ..data.loaders import choose_loader
from ..data.views import View
from ..distributed import World
from ..runs.folder import RunFolder


def checked_images(
    data: Path,
    split: str | None,
    config: RunConfig,
    run: RunFolder,
    world: World,
    *,
    min_size: int,
    name: str = "",
    labeled: bool = False,
) -> ImageList:
    """The images of a folder, found by rank 0 and checked once by all ranks; the results are kept in the run folder.

    The log says what was found. ``split``, ``labeled``: see ``find_images``. ``name``: of what is written, where a run
    has several lists.
    """

    index, cache = run.path / f"shards{name}.json", run.path / f"images{name}.jsonl"
    found = world.from_rank_0(lambda: find_images(data, split, labeled=labeled, index=index))
    run.print(found.summary)
    return check_images(found, cache=cache, min_size=min_size, how=config.check, workers=config.workers, world=world)


def training_images(
    config: TrainConfig, view: View, run: RunFolder, world: World, *, labeled: bool = False
) -> ImageFolder:
    """The images of --data and how they are loaded, which the log says. ``labeled``: see ``find_images``."""
    choose_loader(config.loader, in_memory=config.in_memory, view=view)  # what is missing is told before the images
    images = checked_images(config.data, "train", config, run, world, min_size=config.patch_size, labeled=labeled)
    loader, why = choose_loader(
        config.loader, in_memory=config.in_memory, images=images, view=view, device=world.device
    )
    dataset = ImageFolder(images, view, config.seed, in_memory=config.in_memory, loader=loader, device=world.device)
    run.print(f"images: {len(images):,} from {images.root}, loaded by {loader} on the {dataset.device.type} ({why})")
    return dataset
