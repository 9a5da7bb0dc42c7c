"""The labeled images of a probe: a part to learn from and a part to be tested on."""

from __future__ import annotations

from pathlib import Path

from ...config.options import RunConfig
from ...data.find import find_split
from ...data.images import ImageList
from ...distributed import World
from ...errors import UserError
from ...runs.folder import RunFolder
from ...training.images import checked, found_images


def found_labeled(data: Path, run: RunFolder, world: World) -> dict[str, ImageList]:
    """The images of FOLDER/train/CLASS and FOLDER/test/CLASS (or val), not opened, as "train" and "test".

    Raises:
        UserError: one of them is missing, or the classes are not the same.
    """
    test = find_split(data, "test", "val")
    if test is None or find_split(data, "train") is None:
        raise UserError(
            f"{data} needs the folders train/CLASS and test/CLASS (or val/CLASS) for a probe: keep some images of each "
            "class apart to test with."
        )
    splits = {
        split: found_images(data, folder, run, world, name=f"_{split}", labeled=True)
        for split, folder in (("train", "train"), ("test", test))
    }
    if splits["train"].labels is None or len(splits["train"].classes) < 2:
        raise UserError(f"{data}/train needs at least two class folders for a probe")
    if splits["train"].classes != splits["test"].classes:
        raise UserError(
            f"train has the classes {splits['train'].classes}, {test} has {splits['test'].classes}: "
            "they must be the same"
        )
    return splits


def find_labeled(data: Path, config: RunConfig, run: RunFolder, world: World, min_size: int) -> dict[str, ImageList]:
    """``found_labeled``, checked.

    Raises:
        UserError: also if no image of a class can be used.
    """
    splits = {}
    for split, found in found_labeled(data, run, world).items():
        splits[split] = images = checked(found, config, run, world, min_size=min_size, name=f"_{split}")
        empty = [name for i, name in enumerate(images.classes) if i not in (images.labels or ())]
        if empty:
            raise UserError(
                f"no image of the classes {', '.join(empty)} in {images.root} can be used; add some ({split})"
            )
    return splits
