"""Pictures of a run one at a time, as PNG files: ``beitv2-fast picture KIND RUN -o FILE.png``."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ..config.show import ExploreConfig
from ..data.find import sample_images
from ..data.images import name_of, open_image
from ..errors import UserError
from ..models.student import Student
from ..models.tokenizer import Tokenizer
from ..pictures import code_colors
from ..runs.folder import CONFIG
from ..runs.logs import read_logs
from ..show.attention import attention_probabilities, query_attention
from ..show.codes import choose_codes
from ..show.index import build_index, nearest_patches
from ..show.patch_sheets import attention_columns, attention_sheet, nearest_sheet, similarity_sheet
from ..show.plots import compared_panels, draw_rows
from ..show.runs import Runs, Views, open_runs
from ..show.sheets import code_sheet, display_size, squares, token_map_sheet
from ..show.theme import DARK, LIGHT, Theme
from .picture_options import (
    AttentionConfig,
    CodesConfig,
    CurvesConfig,
    ModelPicture,
    NearestConfig,
    PatchPicture,
    PhotoPicture,
    PictureConfig,
    SimilarityConfig,
    TokensConfig,
)


def write_picture(kind: str, runs: list[Path], out: Path, config: PictureConfig) -> Path:
    """Draw a picture of one of ``PICTURES`` and write it as PNG; an existing file is replaced.

    Args:
        runs: one; of "curves" several. See ``explore`` for what a run may be.

    Raises:
        UserError: no such run, model, image, patch or layer, or a file that cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"-o {out} should end in .png, which is what is written.")
    theme = DARK if config.theme == "dark" else LIGHT
    if kind == "curves":
        picture = draw_curves(runs, cast(CurvesConfig, config), theme)
    else:
        if len(runs) > 1:
            raise UserError(f"a picture of kind {kind} is of one run; {len(runs)} were named. Make one picture each.")
        picture = DRAWINGS[kind](runs[0], config, theme)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        picture.save(buffer, "png", optimize=True)
        out.write_bytes(buffer.getvalue())
    except OSError as error:
        raise UserError(f"the picture could not be written to {out}: {error}. Choose another -o.") from error
    return out


def draw_curves(runs: list[Path], config: CurvesConfig, theme: Theme) -> Image.Image:
    """A folder of runs stands for the trainings in it."""
    inside = {run: [file.parent for file in sorted(run.glob("*/metrics.jsonl"))] for run in runs}
    runs = [part for run in runs for part in (not (run / CONFIG).is_file() and inside[run]) or [run]]
    logs = read_logs(runs)
    for run, metrics in zip(runs, logs.values(), strict=True):
        if not metrics:
            raise UserError(f"{run} has no training log (metrics.jsonl). Name run folders of trainings.")
    return draw_rows(compared_panels(logs), theme, config.scale)


def _open(run: Path, config: ModelPicture, *, images: bool, teacher: bool = False) -> Runs:
    most = getattr(config, "max_images", 24)
    options = ExploreConfig(data=config.data, max_images=most, teacher=teacher, device=config.device, seed=config.seed)
    return open_runs(run, options, with_images=images)


def _codes(run: Path, config: CodesConfig, theme: Theme) -> Image.Image:
    runs, index = _indexed(run, config)
    wrong = [code for code in config.codes if not 0 <= code < runs.tokenizer.num_codes]
    if wrong:
        raise UserError(f"--codes {wrong[0]} does not exist: they go from 0 to {runs.tokenizer.num_codes - 1}.")
    rows = list(config.codes) or choose_codes(index.usage, config.rows)[0]
    return code_sheet(runs.images, index.codes, runs.grid, index.usage, rows, index.colors, theme, config.scale,
                      seed=config.seed)  # fmt: skip


def _indexed(run: Path, config: Any, *, teacher: bool = False) -> tuple[Runs, Any]:
    runs = _open(run, config, images=True, teacher=teacher)
    return runs, build_index(runs, ExploreConfig(seed=config.seed))


def _photos(runs: Runs, config: PhotoPicture) -> tuple[list[Image.Image], list[str]]:
    """The photographs that are named, or some of the run's; and their names."""
    if config.images:
        return [_photo(path) for path in config.images], [path.name for path in config.images]
    chosen = sample_images(runs.samples, config.count, config.seed)
    return [runs.samples.open(i) for i in chosen], [name_of(runs.samples, i) for i in chosen]


def _photo(path: Path) -> Image.Image:
    try:
        return open_image(path)
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}). Name another file.") from error


def _tokens(run: Path, config: TokensConfig, theme: Theme) -> Image.Image:
    runs = _open(run, config, images=not config.images)
    photos, names = _photos(runs, config)
    quantizer = runs.tokenizer.quantize
    colors = code_colors(quantizer.codebook.cpu(), quantizer.cluster_size.cpu())
    codes = runs.views(photos).codes().unflatten(1, runs.grid)
    shown = squares(photos, display_size(runs.grid, len(photos), config.scale))
    return token_map_sheet(shown, codes, colors, names, theme, config.scale)


def _similarity(run: Path, config: SimilarityConfig, theme: Theme) -> Image.Image:
    runs = _open(run, config, images=not config.images, teacher=True)
    photos, names = _photos(runs, config)
    values = runs.views(photos).similarity().unflatten(1, runs.grid)
    shown = squares(photos, display_size(runs.grid, len(photos), config.scale))
    return similarity_sheet(shown, values, names, theme, config.scale)


def _patch(runs: Runs, config: PatchPicture) -> tuple[Image.Image, Views, int]:
    """The photograph, its views, and the number of the chosen patch."""
    photo = runs.samples.open(0) if config.image is None else _photo(config.image)
    row, column = config.patch
    h, w = runs.grid
    if (row, column) == (0, 0):
        row, column = h // 2 + 1, w // 2 + 1
    if not (1 <= row <= h and 1 <= column <= w):
        raise UserError(f"--patch {row} {column} is outside the grid: rows go from 1 to {h}, columns from 1 to {w}.")
    return photo, runs.views([photo]), (row - 1) * w + column - 1


def _attention(run: Path, config: AttentionConfig, theme: Theme) -> Image.Image:
    runs = _open(run, config, images=config.image is None)
    model = _model(runs, config.model)
    photo, views, patch = _patch(runs, config)
    everything = attention_probabilities(model, views.of[config.model], config.layer or None)
    heads = query_attention(everything, patch, runs.grid)[0].cpu()
    square = squares([photo], display_size(runs.grid, attention_columns(len(heads)), config.scale))[0]
    depth = len((model.encoder if isinstance(model, Tokenizer) else model).blocks)
    what = f"{config.model}, layer {config.layer or depth}"
    return attention_sheet(square, heads, patch, what, theme, config.scale, config.share)


def _nearest(run: Path, config: NearestConfig, theme: Theme) -> Image.Image:
    runs, index = _indexed(run, config, teacher=config.by == "teacher")
    if config.by != "teacher":
        _model(runs, config.by)
    photo, views, patch = _patch(runs, config)
    found = nearest_patches(index, views.features(config.by)[0, patch], config.by, 13)
    return nearest_sheet(photo, patch, runs.images, found, runs.grid, config.by, theme, config.scale)


def _model(runs: Runs, name: str) -> Student | Tokenizer:
    model: Student | Tokenizer | None = getattr(runs, name)
    if model is None:
        raise UserError(f"there is no {name} here: {runs.problem} Choose the tokenizer's, or name another run.")
    return model


DRAWINGS: dict[str, Callable[[Path, Any, Theme], Image.Image]] = {
    "codes": _codes, "tokens": _tokens, "nearest": _nearest, "attention": _attention, "similarity": _similarity,
}  # fmt: skip
