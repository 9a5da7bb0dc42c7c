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
import hashlib
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from beitv2_fast.data.find import HELD_OUT, find_images, find_split
from beitv2_fast.errors import UserError, require

SPLIT_SEED = 2208_06366
TEST_SHARE = 0.25
DEFECTIVE_FROM = 0.5
LABELS = ["mono_defective", "mono_intact", "poly_defective", "poly_intact"]  # cell type and defect
README = "README.md"

README_TEXT = """# Photographs of solar cells

{count} electroluminescence photographs of solar cells (300x300, gray) from the PyPI package elpv-dataset {version},
unchanged, arranged as an image folder: `train` and `test` (25 %, stratified by label and cell type), in them folders
of the cell's type (mono- and polycrystalline) and label: `mono_defective`, `poly_intact`, ..., defective where the
annotated probability of a defect is at least 0.5.

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
    """Writes out/{train,test}/{mono,poly}_{defective,intact}/*.png and a README.md with source and license; returns
    ``out``.

    A quarter of each (label, cell type) goes to test, by a fixed seed: every machine gets the same split. The folder
    is made under another name and renamed when complete, so ``out`` is either whole or not there; if it is there
    already, nothing is done.

    Raises:
        UserError: elpv-dataset is not installed, or ``out`` exists and is something else.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if all(sorted(p.name for p in out.glob(f"{split}/*")) == LABELS for split in ("train", "test")):
            return out
        raise UserError(
            f"The demo's photographs should be written to {out}, but that exists and is something else. "
            "Choose another place or move it away."
        )
    package = Path(str(require("elpv_dataset", "demo", "Writing the demo's photographs").__file__)).parent
    cells = _read_labels(package / "data" / "labels.csv")
    files = {f"{place}/{Path(path).name}": package / "data" / path for path, place in _arranged(cells).items()}
    _write(out, files, shutil.copyfile, README_TEXT.format(count=len(cells), version=_version()))
    return out


def split_images(data: Path, out: Path) -> Path:
    """A folder with images to train on and others that are held out: ``data`` itself if it has both, else ``out``.

    There a quarter of each class (of all images, where there are no classes) goes to test, at least one, and the others
    to train, by a hash of their names: the same ones every time, and an image that is added moves no other. They are
    hard links, or copies where the disk is another one.

    Raises:
        UserError: only one of the two is there, with other classes than the other, a class has one image, the images
            lie in shards, or ``out`` holds others.
    """
    kept = find_split(data, *HELD_OUT)
    if kept is not None:
        classes = [find_images(data, split).classes for split in ("train", kept)]
        if classes[0] != classes[1]:
            raise UserError(f"{data}: train has the classes {classes[0]}, {kept} has {classes[1]}. Make them the same.")
        return data
    images = find_images(data)
    if images.spans is not None or find_split(data, "train"):
        raise UserError(f"{data} has nothing to be tested on. Give it {' or '.join(HELD_OUT)} beside train.")
    of_class: dict[str, list[str]] = defaultdict(list)
    for path, label in zip(images.paths, images.labels or [-1] * len(images), strict=True):
        of_class["" if label < 0 else images.classes[label]].append(path)
    places: dict[str, Path] = {}
    for name, members in of_class.items():
        if len(members) < 2:
            raise UserError(f"{images.root / name} has one image; one to train on and one to hold out are needed.")
        members.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
        tests = max(round(len(members) * TEST_SHARE), 1)
        places |= {f"{'test' if i < tests else 'train'}/{path}": images.root / path for i, path in enumerate(members)}
    if not out.exists():
        _write(out, places, _link)
    elif sorted(places) != sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()):
        raise UserError(f"{out} holds other images than {data} now. Remove that folder, or choose another --out.")
    return out


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _write(out: Path, files: dict[str, Path], put: Callable[[Path, Path], object], readme: str = "") -> None:
    """Makes the folder of these files under another name, and renames it when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        for place, source in files.items():
            (part / place).parent.mkdir(parents=True, exist_ok=True)
            put(source, part / place)
        if readme:
            (part / README).write_text(readme, encoding="utf-8")
        _rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    """Gives each cell its place: {path: "train/mono_defective", ...}."""
    strata = defaultdict(list)
    for path, defective, kind in cells:
        strata[defective, kind].append(path)
    generator = random.Random(SPLIT_SEED)
    place = {}
    for (defective, kind), paths in sorted(strata.items()):
        paths.sort()
        generator.shuffle(paths)
        tests = round(len(paths) * TEST_SHARE)
        for i, path in enumerate(paths):
            place[path] = f"{'test' if i < tests else 'train'}/{kind}_{'defective' if defective else 'intact'}"
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
