"""The options of `beitv2-fast picture`, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config.options import option


@dataclass(frozen=True)
class PictureConfig:
    """What every picture has."""

    scale: float = option(2.0, "size of the picture: 1 is 1080 pixels wide", above=0, at_most=8)
    theme: str = option("light", "background and colors", choices=("light", "dark"))


@dataclass(frozen=True)
class CurvesConfig(PictureConfig):
    """Training curves of several runs, or of all in a folder of runs, in the same panels, each run a curve named after
    its folder: losses, accuracies, similarity to the teacher, codebook usage, learning rate, speed, whatever their logs
    have."""


@dataclass(frozen=True)
class ModelPicture(PictureConfig):
    """What every picture that the models make has."""

    data: Path | None = option(None, "folder of images; none: the run's own")
    device: str = option(
        "auto", "what computes; auto: a CUDA or ROCm GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda")
    )
    seed: int = option(0, "draws the images and patches that are shown", at_least=0)


@dataclass(frozen=True)
class CodesConfig(ModelPicture):
    """The codebook sheet: a row for each code, with patches of the data set that share it, from as many photographs as
    possible."""

    max_images: int = option(1000, "images of the data set that are looked at, drawn class by class", at_least=1)
    codes: tuple[int, ...] = option((), "the codes to show; none: half are the most frequent, half spread by rank")
    rows: int = option(16, "how many, if none are named", at_least=1)


@dataclass(frozen=True)
class PhotoPicture(ModelPicture):
    """What every picture of photographs has."""

    images: tuple[Path, ...] = option((), "image files; none: some of the run's, held-out ones where there are any")
    count: int = option(5, "how many, if none are named", at_least=1, at_most=24)


@dataclass(frozen=True)
class TokensConfig(PhotoPicture):
    """Photographs, their token maps (one color per code, similar codes in similar colors), and both laid over
    each other."""


@dataclass(frozen=True)
class SimilarityConfig(PhotoPicture):
    """How close the features that the tokenizer rebuilds from its codes are to its teacher's: the cosine of every
    patch. Loads the teacher."""


@dataclass(frozen=True)
class PatchPicture(ModelPicture):
    """What every picture of a chosen patch has."""

    image: Path | None = option(None, "image file; none: one of the run's, a held-out one where there are any")
    patch: tuple[int, int] = option((0, 0), "row and column of the patch, counted from 1; 0 0: the middle", at_least=0)


@dataclass(frozen=True)
class AttentionConfig(PatchPicture):
    """What a chosen query patch attends to in one layer: the mean of the heads, every head, and the patches that hold
    most of a head's attention (what the reference's visualize_attention.py shows)."""

    model: str = option("student", "whose attention", choices=("student", "tokenizer"))
    layer: int = option(0, "counted from 1; 0: the last", at_least=0)
    share: float = option(0.6, "of a head's attention that the kept patches hold", above=0, at_most=1)


@dataclass(frozen=True)
class NearestConfig(PatchPicture):
    """The patches of the data set whose features are most like a chosen patch's, at most one of an image."""

    by: str = option("student", "whose features", choices=("student", "tokenizer", "teacher"))
    max_images: int = option(1000, "images of the data set that are looked at, drawn class by class", at_least=1)


PICTURES: dict[str, PictureConfig] = {
    "codes": CodesConfig(),
    "tokens": TokensConfig(),
    "nearest": NearestConfig(),
    "attention": AttentionConfig(),
    "similarity": SimilarityConfig(),
    "curves": CurvesConfig(),
}
