"""Which pictures a report has, and how each is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ...config.show import ReportConfig
from ...data.find import sample_images
from ...data.images import ImageFolder, name_of
from ...data.loaders import eval_loader
from ...data.views import EvalView
from ...models.features import features
from ...teachers.base import Teacher
from ..attention import attention_probabilities, query_attention
from ..guesses import Guesses, pretrain_view
from ..index import one_per_image
from ..patch_sheets import attention_columns, attention_sheet, nearest_sheet, similarity_sheet
from ..plots import codebook_panels, compared_panels, draw_panels, draw_rows, pretrain_panels, tokenizer_panels
from ..sheets import code_sheet, display_size, mask_sheet, overlay_sheet, squares, token_map_sheet
from ..theme import Theme
from .downstream import curve_pictures
from .findings import Findings

MASK_EXAMPLES = 4
PATCHES_PER_CODE = 12
NEAREST_IMAGES = 500  # whose patches are compared with the chosen one
NEAREST_SHOWN = 13

Drawing = tuple[str, bool, Callable[[Theme], Image.Image]]  # alternative text, is it of photographs, how to draw it


def drawings_of(found: Findings, config: ReportConfig, rows: list[int]) -> dict[str, Drawing]:
    """The report's pictures by name: those for which there is something to draw."""
    drawings: dict[str, Drawing] = {}
    curves = (
        ("tokenizer", "Curves of the tokenizer's training", tokenizer_panels(found.tokenizer.metrics)),
        ("codebook", "Use of the codebook", codebook_panels(found.tokenizer.metrics, found.usage)),
        ("pretraining", "Curves of the pre-training", pretrain_panels(found.pretrain.metrics, found.hidden_usage)),
    )
    for name, alt, panels in (*curves, *((n, *picture) for n, picture in curve_pictures(found.downstream).items())):
        if any(p.curves or p.bars for p in panels):
            drawings[name] = alt, False, partial(draw_panels, panels, scale=config.scale)
    if panels := compared_panels(found.compared):
        alt = f"Curves of {', '.join(found.compared)}"
        drawings["compared"] = alt, False, lambda theme: draw_rows(panels, theme, config.scale)
    for i, run in enumerate(config.downstream):
        if (sheet := overlay_sheet(run)) is not None:
            alt = "Photographs, their classes, and the classes predicted"
            drawings[f"overlays_{i}"] = alt, True, partial(_as_drawn, sheet)
    if found.codes is None:
        return drawings
    grid = found.tokenizer.model.grid
    if config.examples:
        examples = _examples(found, config, grid)
        drawings["token_maps"] = "Photographs and their token maps", True, _maps(found, examples, config.scale)
        if found.guesses is not None:
            masks = _masks(found, found.guesses, config, grid)
            drawings["masks"] = "Photographs, masks, and codes of hidden patches", True, masks
            attention, nearest = _chosen_patch(found, config, grid)
            drawings["attention"] = "A photograph, and what one of its patches attends to", True, attention
            drawings["nearest"] = "A patch, and the nearest patches of other photographs", True, nearest
        if found.teacher is not None:
            drawings["similarity"] = (
                "Photographs, and the similarity of every patch",
                True,
                _similarity(found, found.teacher, examples, config.scale),
            )
    if rows and (usage := found.usage) is not None:
        codes = found.codes
        drawings["codes"] = "Patches grouped by code", True, lambda theme: code_sheet(
            found.images, codes, grid, usage, rows, found.colors, theme, config.scale,
            columns=PATCHES_PER_CODE, seed=config.seed,
        )  # fmt: skip
    return drawings


def _as_drawn(sheet: Image.Image, theme: Theme) -> Image.Image:
    return sheet


@dataclass(frozen=True)
class _Examples:
    """Photographs that several sheets show: their numbers, names, themselves, and what the tokenizer sees of them."""

    chosen: list[int]
    names: list[str]
    photos: list[Tensor]
    views: Tensor


def _examples(found: Findings, config: ReportConfig, grid: tuple[int, int]) -> _Examples:
    chosen = sample_images(found.shown, config.examples, config.seed)
    photos = squares(map(found.shown.open, chosen), display_size(grid, len(chosen), config.scale))
    views = _views(found, chosen, found.tokenizer.model.config.encoder.image_size)
    return _Examples(chosen, [name_of(found.shown, i) for i in chosen], photos, views)


def _maps(found: Findings, shown: _Examples, scale: float) -> Callable[[Theme], Image.Image]:
    model = found.tokenizer.model
    codes = model.encode(shown.views).cpu().unflatten(1, model.grid)
    return lambda theme: token_map_sheet(shown.photos, codes, found.colors, shown.names, theme, scale)


def _masks(found: Findings, g: Guesses, config: ReportConfig, grid: tuple[int, int]) -> Callable[[Theme], Image.Image]:
    # Another seed than the token maps': other photographs, where there are enough.
    chosen = sample_images(found.shown, min(config.examples, MASK_EXAMPLES), config.seed + 1)
    size = display_size(grid, 4, config.scale)
    crops = ImageFolder(found.shown, pretrain_view(found.pretrain.config, 1, size), config.seed)
    photos = [torch.as_tensor(crops[0, i]["tokenizer"]) for i in chosen]
    masks, codes, guesses = (x[chosen].unflatten(1, grid) for x in (g.masks, g.codes, g.guesses))
    names = [name_of(found.shown, i) for i in chosen]
    return lambda theme: mask_sheet(photos, masks, codes, guesses, found.colors, names, theme, config.scale)


def _chosen_patch(
    found: Findings, config: ReportConfig, grid: tuple[int, int]
) -> tuple[Callable[[Theme], Image.Image], Callable[[Theme], Image.Image]]:
    """What the middle patch of a photograph attends to, and the patches of the data set whose features are nearest."""
    model, device = found.pretrain.model, found.tokenizer.model.quantize.codebook.device
    # Another photograph than the other pictures', where there are enough.
    chosen = sample_images(found.shown, 1, config.seed + 2)
    photo = found.shown.open(chosen[0])
    view = _views(found, chosen, model.vit_config.image_size)
    patch = grid[0] // 2 * grid[1] + grid[1] // 2
    heads = query_attention(attention_probabilities(model, view), patch, grid)[0].cpu()
    square = squares([photo], display_size(grid, attention_columns(len(heads)), config.scale))[0]
    what = f"student, layer {len(model.blocks)}"

    others = found.images.subset(sample_images(found.images, NEAREST_IMAGES, config.seed))
    loader = eval_loader(
        ImageFolder(others, EvalView(model.vit_config.image_size, 1.0)), config.batch_size, config.workers
    )
    every = torch.cat([features(model, batch["image"].to(device)).patches.half().cpu() for batch in loader])
    query = features(model, view).patches[0, patch].cpu()
    near = one_per_image(every.flatten(0, 1), query, every.shape[1], NEAREST_SHOWN)
    return (
        lambda theme: attention_sheet(square, heads, patch, what, theme, config.scale),
        lambda theme: nearest_sheet(photo, patch, others, near, grid, "student", theme, config.scale),
    )


def _similarity(found: Findings, teacher: Teacher, shown: _Examples, scale: float) -> Callable[[Theme], Image.Image]:
    model, trained = found.tokenizer.model, found.tokenizer.config
    target = teacher(_views(found, shown.chosen, trained.teacher_image_size or trained.image_size), model.grid)
    values = model.similarity(shown.views, target).cpu().unflatten(1, model.grid)
    return lambda theme: similarity_sheet(shown.photos, values, shown.names, theme, scale)


def _views(found: Findings, chosen: list[int], size: int) -> Tensor:
    """Center squares [photographs, 3, size, size] in [0, 1] on the models' device."""
    return torch.stack(squares(map(found.shown.open, chosen), size)).to(found.tokenizer.model.quantize.codebook.device)
