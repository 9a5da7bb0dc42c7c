"""The options of what shows a run: the report and the explore page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .options import SOURCE, RunConfig, option


@dataclass(frozen=True)
class ReportConfig(RunConfig):
    """The report: one HTML file and its pictures, from the run folders of the other commands."""

    stage: ClassVar[str] = "report"
    example: ClassVar[str] = (
        "python train/report.py --tokenizer runs/tokenizer --pretrain runs/pretrain --out runs/report"
    )
    out: Path = option(Path("runs/report"), "folder of the report: report.html and PNG files; replaced if there is one")
    data: Path | None = option(
        None, "the image folder; examples come from FOLDER/test or FOLDER/val, if there is one; none: that of the "
        "trainings"
    )  # fmt: skip
    tokenizer: Path = option(Path("runs/tokenizer"), f"the tokenizer: {SOURCE}")
    pretrain: Path = option(Path("runs/pretrain"), f"the pre-training: {SOURCE}")
    probe: Path = option(Path("runs/probe"), "run folder of the linear probe")
    downstream: tuple[Path, ...] = option(
        (), "run folders of fine-tunings, segmentations and evaluations, to be reported too"
    )
    compare: tuple[Path, ...] = option((), "run folders of any trainings, whose curves are drawn beside each other")
    teacher: bool = option(True, "load the tokenizer's teacher, to show what the codes keep of it", free=True)
    max_images: int = option(5000, "images of train, and of test or val, that are encoded; more: a sample")
    examples: int = option(6, "photographs shown with their token map; up to 4 with their mask")
    code_rows: int = option(24, "codes on the sheet of patches: half the most frequent, half a spread of the others")
    scale: float = option(2.0, "pixels of the pictures for each pixel of the page; 2: sharp on dense screens")
    batch_size: int = option(64, "images per forward", free=True)


@dataclass(frozen=True)
class ExploreConfig:
    """Explore a run on a page in the browser: the tokens of an image, each token's other patches in the data set, what
    a patch attends to, and the mask game. It listens only on 127.0.0.1. RUN: a folder with the runs tokenizer/ and
    pretrain/ in it (as `make demo` leaves), or a tokenizer or a pre-training: a run folder, a file, a URL,
    hf-hub:ORGANIZATION/NAME, or a name that `beitv2-fast models` lists."""

    data: Path | None = option(None, "folder of images to compare with; none: the run's own")
    max_images: int = option(
        1000, "images of the data set that are compared with, drawn class by class; memory and the time to start grow "
        "with it", at_least=1,
    )  # fmt: skip
    teacher: bool = option(
        False, "also load the tokenizer's teacher: nearest patches by its features, and how well the tokens keep them"
    )
    port: int = option(8317, "port on 127.0.0.1; 0: any that is free", at_least=0, at_most=65535)
    device: str = option(
        "auto", "what computes; auto: a CUDA or ROCm GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda")
    )
    browser: bool = option(True, "open the page in the browser, where there is a screen")
    seed: int = option(0, "draws the images and the patches that are shown", at_least=0)
