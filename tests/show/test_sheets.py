"""Sheets and what they are made of: patches of a code, usage of the codebook, token maps, hidden patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("matplotlib")

from matplotlib import get_data_path
from matplotlib.figure import Figure

from beitv2_fast.data.find import find_images
from beitv2_fast.pictures import HIDDEN, code_colors, heat_map, masked_picture, token_map
from beitv2_fast.show.codes import CodeUsage, choose_codes, choose_patches
from beitv2_fast.show.plots import Curve, Panel, _draw_curves
from beitv2_fast.show.sheets import LABEL, Label, Sheet, code_sheet, patch_picture, token_map_sheet
from beitv2_fast.show.theme import LIGHT, _installed, lettering, shortened

COLORS = [(220, 40, 40), (40, 200, 60), (50, 70, 230), (230, 210, 40)]


def quartered(folder: Path, count: int) -> tuple:
    """Images of 2x2 patches, each of one of four colors, wider than high; and the colors' numbers [count, 4]."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, len(COLORS), (count, 4), generator=generator)
    for i, image_codes in enumerate(codes.tolist()):
        image = Image.new("RGB", (60, 40), "black")
        for patch, code in enumerate(image_codes):
            image.paste(COLORS[code], [10 + patch % 2 * 20, patch // 2 * 20, 30 + patch % 2 * 20, 20 + patch // 2 * 20])
        image.save(folder / f"{i:02d}.png")
    return find_images(folder), codes


def framed_center(side: int, patch: int) -> tuple[int, int]:
    """Where the patch is in its picture: there is room for half a patch left and right of it, not above and below."""
    return side // 2, side // 4 + patch // 2 * side // 2


def test_a_framed_patch_is_the_patch(tmp_path):
    images, codes = quartered(tmp_path, 1)
    for patch, code in enumerate(codes[0].tolist()):
        picture = patch_picture(Image.open(tmp_path / images.paths[0]), (2, 2), patch, 100, LIGHT)
        assert picture.getpixel(framed_center(100, patch)) == COLORS[code]


def test_a_row_of_the_sheet_shows_patches_of_its_code_alone(tmp_path, monkeypatch):
    images, codes = quartered(tmp_path, 9)
    usage = CodeUsage(torch.bincount(codes.flatten(), minlength=5))
    drawn = []

    def remember(photo, grid, patch, side, theme):
        picture = patch_picture(photo, grid, patch, side, theme)
        drawn.append(picture.getpixel(framed_center(side, patch)))
        return picture

    monkeypatch.setattr("beitv2_fast.show.sheets.patch_picture", remember)
    code_sheet(images, codes, (2, 2), usage, [2, 0], torch.rand(5, 3), LIGHT, 0.5, columns=3)
    assert drawn == [COLORS[2]] * 3 + [COLORS[0]] * 3


def test_the_labels_of_a_token_map_sheet_are_not_cut_short(monkeypatch):
    drawn, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, line, **how: drawn.append(line) or text(self, at, line, **how)
    )
    token_map_sheet(
        [torch.rand(3, 16, 16)], torch.zeros(1, 2, 2, dtype=torch.int64), torch.rand(1, 3), ["a"], LIGHT, 2.0
    )
    assert {"photograph", "token map", "both"} <= set(drawn)
    assert not [line for line in drawn if "..." in line]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The fonts of the system, all but the first of which have a watch, which DejaVu Sans has not."""
    fonts = [tmp_path / f"{name}.ttf" for name in ("a", "LastResort", "b-BoldItalic", "c-Bold", "d-Regular")]
    fonts[0].write_text("no font")
    for font in fonts[1:]:
        font.symlink_to(Path(get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [str(font) for font in fonts])
    _installed.cache_clear()
    yield [str(font) for font in fonts[3:]]
    _installed.cache_clear()


@pytest.mark.parametrize("bold", [False, True])
def test_a_name_is_drawn_with_a_font_that_has_its_letters_and_escaped_where_none_has(installed, bold):
    usual, letters = lettering("Gürtel $x_1$ 😀", bold)
    assert Path(usual).name == ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    assert "".join(letters) == "Gürtel $x_1$ 😀"
    assert lettering("⌚ a\nb", bold) == (installed[not bold], ["⌚", " ", "a", r"\n", "b"])
    assert lettering("⌚ 猫", bold) == (usual, [r"\u231a", " ", r"\u732b"])
    assert lettering("a\n", bold) == (usual, ["a", r"\n"])


def test_of_a_long_name_the_beginning_and_the_end_are_kept_and_no_escape_is_cut():
    assert shortened(["a"] * 9, 9) == "a" * 9
    assert shortened(["a", "b", *"xxxx", r"\u732b", "c"], 11) == "a...c" and shortened([*"abcdefgh"], 7) == "ab...gh"


def test_a_sheet_draws_a_name_with_the_font_that_has_its_letters(installed, monkeypatch):
    drawn = {}
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, at, line, **how: drawn.update({line: how["font"]}))
    Sheet(LIGHT, 2.0).draw([[None]], [Label(["猫"])], ["⌚"], 100)
    assert drawn["⌚"].path == installed[1] and Path(drawn[r"\u732b"].path).name == "DejaVuSans-Bold.ttf"


def test_a_legend_has_the_names_of_the_runs_as_they_are_and_long_ones_without_their_middle(installed):
    axes = Figure().subplots()
    names = ["_a", "cost$1$", "⌚", "run_" + "x" * 60 + "_lr_0.1", "猫" * 40]
    _draw_curves(axes, Panel("loss", [Curve(name, [1.0, 2.0], [1.0, 2.0]) for name in names]), LIGHT)
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts[:3]] == names[:3]
    assert texts[3].get_text() == "run_" + "x" * 10 + "..." + "x" * 7 + "_lr_0.1"
    assert texts[4].get_text() == r"\u732b\u732b...\u732b\u732b"
    assert not any(text.get_parse_math() for text in texts)
    assert texts[2].get_fontproperties().get_file() == installed[1]


def test_a_color_bar_goes_from_the_color_of_0_to_that_of_1():
    label = Label(["cosine", "0 to 1:"], bar=heat_map(torch.linspace(0, 1, 64)[None], 1))
    drawn = Sheet(LIGHT, 1.0).draw([[None]], [label], [], 100)
    pixels = torch.tensor(list(drawn.crop((0, 73, LABEL, 74)).getdata()))
    inside = pixels[(pixels != 255).any(1)]
    assert len(inside) > 80
    ends = [(heat_map(torch.tensor([[value]]), 1).flatten() * 255).round() for value in (0.0, 1.0)]
    assert (inside[[0, -1]] - torch.stack(ends)).abs().max() <= 12


def test_patches_come_from_as_many_images_as_possible():
    codes = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert {image for image, _ in choose_patches(codes, 1, 2, seed=3)} == {0, 1}
    found = choose_patches(codes, 1, 99, seed=3)
    assert sorted(found) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert choose_patches(codes, 7, 4, seed=3) == []


def test_the_sheet_has_the_most_frequent_codes_and_a_spread_of_the_others():
    usage = CodeUsage(torch.arange(20).flip(0))  # code 0 most frequent, code 19 not used
    rows, top = choose_codes(usage, 6)
    assert (rows[:3], top) == ([0, 1, 2], 3)
    assert rows[3:] == sorted(rows[3:]) and rows[3] > 4 and 12 < rows[-1] < 19
    assert choose_codes(usage, 50) == (list(range(19)), 19)


def test_usage_numbers_of_a_known_distribution():
    usage = CodeUsage(torch.tensor([50, 25, 25, 0]))
    assert usage.used == 3 and usage.ranking.tolist() == [0, 1, 2, 3]
    assert usage.perplexity == pytest.approx(2**1.5) and (usage.covering(0.5), usage.covering(0.9)) == (1, 3)


def test_near_codes_have_near_colors():
    angles = torch.cat([torch.linspace(0, 0.2, 8), torch.linspace(3, 3.2, 8)])
    codebook = torch.stack([angles.cos(), angles.sin(), torch.zeros(16)], dim=1)
    colors = code_colors(codebook, torch.ones(16, dtype=torch.int64))
    assert colors.shape == (16, 3) and colors.min() >= 0 and colors.max() <= 1
    within, between = (colors[0] - colors[1]).norm(), (colors[:8].mean(0) - colors[8:].mean(0)).norm()
    assert within < between / 2


def test_a_token_map_has_the_color_of_each_code():
    colors = torch.rand(4, 3)
    picture = token_map(torch.tensor([[3, 1]]), 2, colors)
    assert picture.shape == (3, 2, 4) and torch.equal(picture[:, 0, 0], colors[3])
    assert torch.equal(picture[:, 1, 3], colors[1])


def test_a_masked_picture_hides_the_masked_patches_alone():
    image = torch.rand(3, 4, 4)
    picture = masked_picture(image, torch.tensor([[True, False], [False, False]]))
    assert torch.equal(picture[:, 0, 1], torch.tensor(HIDDEN)) and torch.equal(picture[:, 2:], image[:, 2:])
    assert torch.equal(picture[:, :2, 2:], image[:, :2, 2:])
