"""The demo's photographs: 2,624 solar cells of the PyPI package elpv-dataset, laid out as an image folder.

The images are electroluminescence photographs of solar cells, 300x300 gray, each with an annotated probability of a
defect. They are licensed CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): for non-commercial use,
with attribution, shared alike. This package does not contain them; it copies them out of elpv-dataset where that is
installed.

Sources: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
Imagery", EU PVSEC 2018, doi 10.4229/35thEUPVSEC20182018-5CV.3.15; Deitsch et al., "Automatic classification of
defective photovoltaic module cells in electroluminescence images", Solar Energy 185, 2019; Deitsch et al.,
"Segmentation of photovoltaic module cells in uncalibrated electroluminescence images", 2021.
"""

import csv
import os
import random
import shutil
from collections import defaultdict
from pathlib import Path

from beitv2_fast.errors import UserError, require

SPLIT_SEED = 2208_06366
TEST_SHARE = 0.25
DEFECTIVE_FROM = 0.5
README = "README.md"

README_TEXT = """# Photographs of solar cells

{count} electroluminescence photographs of solar cells (300x300, gray) from the PyPI package elpv-dataset {version},
unchanged, arranged as an image folder: `train` and `test` (25 %, stratified by label and cell type),
`defective` where the annotated probability of a defect is at least 0.5, else `intact`.

License: Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International (CC BY-NC-SA 4.0),
https://creativecommons.org/licenses/by-nc-sa/4.0/. Not for commercial use.

Authors: Claudia Buerhop-Lutz, Sergiu Deitsch, Andreas Maier, Florian Gallwitz, Stephan Berger, Bernd Doll,
Jens Hauch, Christian Camus, Christoph J. Brabec; https://github.com/zae-bayern/elpv-dataset

- Buerhop-Lutz et al.: A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery.
  35th European PV Solar Energy Conference and Exhibition, 2018. doi 10.4229/35thEUPVSEC20182018-5CV.3.15
- Deitsch et al.: Automatic classification of defective photovoltaic module cells in electroluminescence images.
  Solar Energy 185, 2019. doi 10.1016/j.solener.2019.02.067
- Deitsch et al.: Segmentation of photovoltaic module cells in uncalibrated electroluminescence images.
  Machine Vision and Applications 32, 2021. doi 10.1007/s00138-021-01191-9
"""


def write_demo_images(out: str | Path) -> Path:
    """Writes out/{train,test}/{defective,intact}/*.png and a README.md with source and license; returns ``out``.

    A quarter of each (label, cell type) goes to test, by a fixed seed: every machine gets the same split. The folder
    is made under another name and renamed when complete, so ``out`` is either whole or not there; if it is there
    already, nothing is done.

    Raises:
        UserError: elpv-dataset is not installed, or ``out`` exists and is something else.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if all((out / split / label).is_dir() for split in ("train", "test") for label in ("defective", "intact")):
            return out
        raise UserError(
            f"The demo's photographs should be written to {out}, but that exists and is something else. "
            "Choose another place or move it away."
        )
    package = Path(str(require("elpv_dataset", "demo", "Writing the demo's photographs").__file__)).parent
    cells = _read_labels(package / "data" / "labels.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        for path, place in _arranged(cells).items():
            target = part / place / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / "data" / path, target)
        (part / README).write_text(README_TEXT.format(count=len(cells), version=_version()), encoding="utf-8")
        _rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _read_labels(file: Path) -> list[tuple[str, bool, str]]:
    """-> (path relative to the file, is it defective, "mono" or "poly") of each cell.

    The package's own load_dataset() decodes all images to arrays; copying the files keeps them bit by bit and takes
    less than a second.
    """
    if not file.is_file():
        raise UserError(f"elpv-dataset is installed without {file}. Install it again: pip install 'beitv2-fast[demo]'")
    rows = csv.reader(file.read_text(encoding="utf-8").splitlines(), delimiter=" ", skipinitialspace=True)
    return [(path, float(probability) >= DEFECTIVE_FROM, kind.strip()) for path, probability, kind in rows]


def _arranged(cells: list[tuple[str, bool, str]]) -> dict[str, str]:
    """Gives each cell its place: {path: "train/defective", ...}."""
    strata = defaultdict(list)
    for path, defective, kind in cells:
        strata[defective, kind].append(path)
    generator = random.Random(SPLIT_SEED)
    place = {}
    for (defective, _), paths in sorted(strata.items()):
        paths.sort()
        generator.shuffle(paths)
        tests = round(len(paths) * TEST_SHARE)
        for i, path in enumerate(paths):
            place[path] = f"{'test' if i < tests else 'train'}/{'defective' if defective else 'intact'}"
    return place


def _remove_leftovers(out: Path) -> None:
    """Removes what killed processes were writing; their ids are in the names."""
    for part in out.parent.glob(f".{out.name}.part-*"):
        try:
            os.kill(int(part.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(part, ignore_errors=True)
        except (ValueError, PermissionError):
            pass


def _rename(part: Path, out: Path) -> None:
    """Gives the complete folder its name; if another process was first, its folder stays."""
    try:
        part.rename(out)
    except OSError:
        if not (out / README).is_file():
            raise


def _version() -> str:
    from importlib.metadata import version

    return version("elpv-dataset")
