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
    """The images of a folder, checked once: rank 0 decodes them all, the others read what it wrote beside the run.

    The log says what was found. ``split``, ``labeled``: see ``find_images``. ``name``: of what is written, where a run
    has several lists.
    """

    def checked() -> ImageList:
        found = find_images(data, split, labeled=labeled, index=run.path / f"shards{name}.json")
        run.print(found.summary)
        return check_images(found, cache=run.path / f"images{name}.json", min_size=min_size, workers=config.workers)

    return world.rank_0_first(checked)


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
