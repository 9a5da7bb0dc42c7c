"""The images of a training: found, checked once for all ranks, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
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


def found_images(
    data: Path, split: str | None, run: RunFolder, world: World, *, name: str = "", labeled: bool = False
) -> ImageList:
    """The images of a folder, found by rank 0, before any is opened.

    ``split``, ``labeled``: see ``find_images``. ``name``: of what is written, where a run has several lists.
    """
    index = run.path / f"shards{name}.json"
    return world.from_rank_0(lambda: find_images(data, split, labeled=labeled, index=index))


def checked(
    found: ImageList, config: RunConfig, run: RunFolder, world: World, *, min_size: int, name: str = ""
) -> ImageList:
    """What is left of them once all ranks have checked them; the results are kept in the run folder.

    The log says what was found.
    """
    run.print(found.summary)
    cache = run.path / f"images{name}.jsonl"
    return check_images(found, cache=cache, min_size=min_size, how=config.check, workers=config.workers, world=world)


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
    """``found_images``, ``checked``."""
    found = found_images(data, split, run, world, name=name, labeled=labeled)
    return checked(found, config, run, world, min_size=min_size, name=name)


def training_images(
    config: TrainConfig,
    view: View,
    run: RunFolder,
    world: World,
    *,
    labeled: bool = False,
    before: Callable[[ImageList], object] = lambda _: None,
) -> ImageFolder:
    """The images of --data and how they are loaded, which the log says.

    ``labeled``: see ``find_images``. ``before``: raises what is wrong with the images that were found, or with those to
    evaluate on, before all are checked, which takes minutes.
    """
    choose_loader(config.loader, in_memory=config.in_memory, view=view)  # what is missing is told before the images
    found = found_images(config.data, "train", run, world, labeled=labeled)
    before(found)
    images = checked(found, config, run, world, min_size=config.patch_size)
    loader, why = choose_loader(
        config.loader, in_memory=config.in_memory, images=images, view=view, device=world.device
    )
    dataset = ImageFolder(images, view, config.seed, in_memory=config.in_memory, loader=loader, device=world.device)
    run.print(f"images: {len(images):,} from {images.root}, loaded by {loader} on the {dataset.device.type} ({why})")
    return dataset
