"""Images and their masks: where they lie, which belong together, what the labels mean, and whether all of them fit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.find import split_folder, splits_in
from ...data.images import EXIF_ORIENTATION, ImageList
from ...data.names import IMAGE_SUFFIXES, is_left_over
from ...errors import DataError, first_few, first_lines, require
from ...runs.files import write_atomically

IGNORED = 255  # the label that counts for nothing
BEYOND = 254  # the label that no class has, which --label-values gives to what it does not name
MASK_FOLDERS = ("masks", "annotations", "labels")
LABEL_MODES = ("L", "P", "1")  # PIL's modes whose pixels are labels
LOSSY = ("JPEG", "JPEG2000")  # PIL's formats that do not keep labels
MOST_LABELS = 64  # in one mask: more are shades of a picture that was resized, smoothed or compressed
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def find_folders(root: Path, *splits: str) -> tuple[Path, Path] | None:
    """The folders of images and masks of the first of these splits that root has; None if it has none.

    No split: those of root itself; None if it is divided into splits.
    """
    pairs = []
    if not splits and not splits_in(root / "images"):
        pairs = [(root / "images", root / masks) for masks in MASK_FOLDERS]
    for split in splits:
        folder, images = split_folder(root, split), split_folder(root / "images", split)
        for name in MASK_FOLDERS:
            masks = split_folder(root / name, split)
            pairs += [] if folder is None else [(folder / "images", folder / name)]
            pairs += [] if images is None or masks is None else [(images, masks)]
    return next((pair for pair in pairs if all(folder.is_dir() for folder in pair)), None)


def training_folders(root: Path) -> tuple[Path, Path]:
    """Of the training; DataError if there are none."""
    found = find_folders(root, "train") or find_folders(root)
    if found is None:
        raise DataError(
            f"{root} has no images with masks for training. Expected {root}/train/images and {root}/train/masks, or as "
            f"ADE20K {root}/images/training and {root}/annotations/training, or {root}/images and {root}/masks."
        )
    return found


def validation_folders(root: Path, val: Path | None) -> tuple[Path, Path] | None:
    """Those of --val, else of --data's val, validation or test; None without."""
    if val is None:
        return find_folders(root, "val", "test")
    found = find_folders(val) or find_folders(val, "val", "test", "train")
    if found is None:
        raise DataError(f"--val {val} has no images with masks. Expected {val}/images and {val}/masks.")
    return found


@dataclass(frozen=True)
class MaskList:
    """The masks of an ImageList's images, in its order.

    Attributes:
        root: the folder. paths: relative to it. sizes: (width, height) of each. labels: those that occur in each.
    """

    root: Path
    paths: list[str]
    sizes: list[tuple[int, int]]
    labels: list[list[int]]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> np.ndarray:
        """Labels uint8 [H, W] as the file has them."""
        return open_mask(self.root / self.paths[index])

    def largest_label(self, table: np.ndarray) -> int:
        """The largest training label of any mask; -1 if all is ignored. ``table``: a ``label_table``."""
        used = {int(table[label]) for labels in self.labels for label in labels} - {IGNORED}
        return max(used, default=-1)

    def check_range(self, table: np.ndarray, num_classes: int) -> None:
        """DataError, with the files' names, if a mask has labels beyond the classes."""
        wrong = []
        for path, labels in zip(self.paths, self.labels, strict=True):
            beyond = [label for label in labels if num_classes <= table[label] < IGNORED]
            if beyond:
                wrong.append(f"{path}: {', '.join(map(str, beyond[:8]))}")
        if wrong:
            raise DataError(
                f"{len(wrong)} of {len(self)} masks in {self.root} have labels beyond the {num_classes} classes:\n"
                f"{first_lines(wrong)}\nGive --num-classes as many as there are, or with --label-values those that are "
                "classes, name labels that count for nothing with --ignore-labels, or correct the masks."
            )

    def doubt(self, table: np.ndarray, num_classes: int) -> str | None:
        """Why the labels may not be the numbers of classes, and what to do; None if they look so."""
        used = sorted({label for labels in self.labels for label in labels})
        counting = {int(table[label]) for label in used} - {IGNORED}
        if 2 * len(counting) >= num_classes:
            return None
        some = first_few(used, between=" ")
        return (
            f"the masks in {self.root} have labels of {len(counting)} of {num_classes} classes: {some}. If these are "
            f"no numbers of classes, say which label is class 0, which class 1, ...: --label-values {some}"
        )

    def check_foreground(self, table: np.ndarray) -> None:
        """DataError if only one class is left because 255 counts for nothing, as in masks that are black and white."""
        used = sorted({label for labels in self.labels for label in labels})
        counting = {int(table[label]) for label in used} - {IGNORED}
        if IGNORED in used and table[IGNORED] == IGNORED and len(counting) < 2:
            raise DataError(
                f"The masks in {self.root} have the labels {first_few(used, between=' ')}, of which 255 counts for "
                f"nothing, so that {len(counting)} is left to learn. If 255 is a class, as in black and white masks, "
                "give --label-values 0 255: black is class 0, white is class 1."
            )


def label_table(ignore: tuple[int, ...], reduce_zero_label: bool, values: tuple[int, ...] = ()) -> np.ndarray:
    """For each label in a file the label in training: uint8 [256]; 255 counts for nothing.

    Args:
        ignore: labels that count for nothing. reduce_zero_label: so does 0, and 1 is the first class.
        values: the labels that are class 0, 1, ..., whatever ``reduce_zero_label`` says. Others are beyond all classes,
            but for those that count for nothing: 255, unless it is among these values, and ``ignore``.
    """
    table = np.arange(256)
    if values:
        table[:IGNORED] = BEYOND
        table[list(values)] = np.arange(len(values))
    elif reduce_zero_label:
        table[1:255] -= 1
        table[0] = IGNORED
    table[list(ignore)] = IGNORED
    return table.astype(np.uint8)


def open_mask(path: Path) -> np.ndarray:
    """Labels uint8 [H, W] of a gray or palette image; ValueError if it is something else."""
    with Image.open(path) as image:
        if image.format in LOSSY:
            raise ValueError(f"a {image.format} picture, which does not keep labels as they were; save them as PNG")
        if image.mode in LABEL_MODES:
            return np.array(image, dtype=np.uint8)
        if image.mode.startswith("I"):
            labels = np.array(image)
            if labels.min() < 0 or labels.max() > 255:
                raise ValueError(f"labels from {labels.min()} to {labels.max()}, but 0 to 255 are possible")
            return labels.astype(np.uint8)
        raise ValueError(f"a color image (mode {image.mode}); its labels should be gray values or a palette's numbers")


def find_masks(images: ImageList, folder: Path, cache: Path | None, workers: int) -> MaskList:
    """The masks of all images, each decoded once.

    Args:
        folder: has a file of each image's name (PNG or another format) in the same subfolder.
        cache: a JSON file for what was found, so that a restart decodes only what has changed.
        workers: threads that decode.

    Raises:
        DataError: masks that are missing, unreadable, no label images, or of another size than their image, by name.
    """
    by_stem: dict[str, list[str]] = {}
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not any(map(is_left_over, path.parts)):
            by_stem.setdefault(path.with_suffix("").as_posix(), []).append(path.as_posix())
    named = [_lossless(by_stem.get(Path(path).with_suffix("").as_posix(), [])) for path in images.paths]
    known = _read_cache(cache, folder)
    with ThreadPoolExecutor(max(workers, 1)) as pool:  # PIL decodes without holding the interpreter's lock
        tqdm = require("tqdm", "train", "A progress bar").tqdm
        numbers = range(len(images))
        bar = tqdm(
            numbers, desc="checking masks", unit="mask", mininterval=0.5, disable=len(known) >= len(images) or None
        )
        found = list(pool.map(lambda i: _check(images, i, folder, named[i], known), bar))
    wrong = [f"{images.paths[i]}: {f['problem']}" for i, f in enumerate(found) if "problem" in f]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(images)} images in {images.root} have no mask in {folder} that fits:\n"
            f"{first_lines(wrong)}\nMend or remove these, or name another folder."
        )
    paths = [path for (path,) in named]
    entries = dict(zip(paths, found, strict=True))
    if cache is not None and entries != known:
        write_atomically(cache, json.dumps({"root": str(folder), "files": entries}, separators=(",", ":")))
    return MaskList(folder, paths, [tuple(f["size"]) for f in found], [f["labels"] for f in found])


def _lossless(paths: list[str]) -> list[str]:
    """Without JPEG files that only show a mask of another format."""
    return [path for path in paths if not path.lower().endswith((".jpg", ".jpeg"))] or paths


def _check(images: ImageList, index: int, folder: Path, named: list[str], known: dict[str, dict]) -> dict:
    """What is to be known of a mask, or {"problem": what is wrong with it}."""
    if len(named) != 1:
        return {"problem": f"several masks of this name: {', '.join(named)}" if named else "no mask of this name"}
    (path,) = named
    stat = (folder / path).stat()
    state = [stat.st_size, stat.st_mtime_ns]
    entry = known.get(path)
    try:
        if entry is None or entry["state"] != state:
            labels = open_mask(folder / path)
            counts = np.bincount(labels.ravel(), minlength=256)
            entry = {
                "state": state,
                "size": [labels.shape[1], labels.shape[0]],
                "labels": np.flatnonzero(counts).tolist(),
            }
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        return {"problem": f"the mask {path}: {' '.join(str(error).split())[:200] or type(error).__name__}"}
    size = _upright_size(images.file(index))
    if entry["size"] != size:
        width, height = entry["size"]
        return {"problem": f"the mask {path} has {width}x{height} pixels, the image {size[0]}x{size[1]}"}
    if len(entry["labels"]) > MOST_LABELS:
        return {
            "problem": f"the mask {path} has {len(entry['labels'])} labels: shades of a picture that was smoothed, "
            "resized or compressed. Make it again, resized with nearest-neighbor interpolation and saved as PNG"
        }
    return entry


def _upright_size(path: Path) -> list[int]:
    with Image.open(path) as image:  # reads only the header
        width, height = image.size
        return [height, width] if image.getexif().get(EXIF_ORIENTATION, 1) in TURNED else [width, height]


def _read_cache(cache: Path | None, folder: Path) -> dict[str, dict]:
    try:
        content = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return content["files"] if isinstance(content, dict) and content.get("root") == str(folder) else {}
