"""`beitv2-fast explore RUN`: a local page to see what the tokens of an image mean, and to play the mask game.

runs.py      which runs, images and teacher a RUN stands for
index.py     every patch of the data set: its code, its features, what is typical of a code
answers.py   what the page asks, answered by models and index
server.py    HTTP on 127.0.0.1
page/        the page: put together into one document that loads nothing from elsewhere
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import option

__all__ = ["ExploreConfig", "explore"]


@dataclass(frozen=True)
class ExploreConfig:
    """Explore a run on a page in the browser: the tokens of an image, each token's other patches in the data set, what
    a patch attends to, and the mask game. It listens on 127.0.0.1 alone. RUN: a folder with the runs tokenizer/ and
    pretrain/ in it (as `make demo` leaves), or the run folder of a tokenizer or of a pre-training."""

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


def explore(run: Path, config: ExploreConfig) -> int:
    """Index the data set, then serve the page until interrupted.

    Raises:
        UserError: no such run, no images, runs that do not belong together, a port in use.
    """
    from .answers import Answers  # these bring PIL and the models
    from .index import build_index
    from .runs import open_runs
    from .server import serve

    runs = open_runs(run, config)
    return serve(Answers(runs, build_index(runs, config), config.seed), config)
