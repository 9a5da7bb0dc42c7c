"""``python -m bench.gpu.pictures FOLDER COUNT``: JPEG files of photographs' size where there are no photographs.

Smooth colors with noise, 500 x 375, in ten class folders of train and of test: what a decoder has to do is that of
photographs, what can be learned from them is not.
"""

from __future__ import annotations

import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, SIZE = 10, (500, 375)


def write(folder: Path, index: int) -> None:
    random = np.random.default_rng(index)
    colors = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.BICUBIC)
    pixels = np.asarray(colors).astype(np.int16) + random.normal(0, 12, (SIZE[1], SIZE[0], 3)).astype(np.int16)
    split = "test" if index // CLASSES % 5 == 0 else "train"
    file = folder / split / f"class{index % CLASSES}" / f"{index:06d}.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    for split in ("train", "test"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        pool.map(partial(write, folder), range(count), chunksize=16)


if __name__ == "__main__":
    main()
