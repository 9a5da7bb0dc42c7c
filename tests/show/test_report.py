"""The report: self-contained, complete, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from beitv2_fast.config.show import ReportConfig
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.data.find import find_images, sample_images
from beitv2_fast.errors import UserError
from beitv2_fast.runs.logs import read_metrics
from beitv2_fast.show.report import build_report
from beitv2_fast.show.report.findings import gather
from beitv2_fast.show.report.page import probe_cells, results_table, sampling_error
from beitv2_fast.show.report.text import verdict
from beitv2_fast.weights.build import build_student, build_tokenizer

from ..support.small_runs import SHAPE, TinyTeacher, write_images, write_run

SECTIONS = [
    "probe", "tokenizer", "codebook", "maps", "similarity", "codes", "pretraining", "masks", "attention", "how",
]  # fmt: skip
PICTURES = [
    "tokenizer", "codebook", "token_maps", "similarity", "codes", "pretraining", "masks", "attention", "nearest",
]  # fmt: skip


def tokenizer_line(step: int, **values: float) -> dict:
    line = {"step": step, "loss": 1 / step, "rec_loss": 0.9 / step, "commit_loss": 0.1 / step, "used_codes": 0.5}
    return {**line, "perplexity": 4.0, "epoch": step / 2, "lr": 1e-3, **values}


def pretrain_line(step: int) -> dict:
    line = {"step": step, "loss": 4 / step, "loss_mim": 2 / step, "loss_agg": 2 / step, "accuracy_mim": 0.1 * step}
    return {**line, "accuracy_agg": 0.1 * step, "epoch": step / 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """data/{train,test}/{a,b}/*.png and the run folders tokenizer, pretrain and probe, untrained but complete."""
    root = tmp_path_factory.mktemp("runs")
    write_images(root / "data")
    (root / "data" / "README.md").write_text("License: <CC BY>, https://creativecommons.org/")
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(**SHAPE, num_codes=8, code_dim=4, decoder_depth=1, teacher="efficientnet_lite0")
    write_run(root / "tokenizer", tokenizer, build_tokenizer(tokenizer, 12), [tokenizer_line(s) for s in range(1, 5)])
    pretrain = PretrainConfig(**SHAPE, early_layer=1, num_masked=6, min_mask_patches=2)
    write_run(root / "pretrain", pretrain, build_student(pretrain, 8), [pretrain_line(s) for s in range(1, 5)])
    start = "2026-01-01 10:0{}:00  started by beitv2-fast 1 on 2 x CPU: python a.py --out <mine>\n"
    (root / "tokenizer" / "log.txt").write_text(start.format(0) + "2026-01-01 10:01:30  stopped\n" + start.format(5))
    (root / "probe").mkdir()
    rows = [{"features": name, "mean": mean, "std": 0.01} for name, mean in (("pre-trained, x", 0.7), ("pixels", 0.8))]
    results = {"task": "a or b", "metric": "balanced accuracy", "chance": 0.5, "majority": 0.687, "seeds": 3}
    (root / "probe" / "results.json").write_text(json.dumps({**results, "rows": rows, "notes": ["A note on <this>."]}))
    return root


def config(root: Path, out: Path, **values) -> ReportConfig:
    folders = {name: root / name for name in ("data", "tokenizer", "pretrain", "probe")}
    small = {"workers": 0, "examples": 2, "code_rows": 4, "scale": 0.5}
    return ReportConfig(out=out, **{**folders, **small, **values})


def report(root: Path, out: Path, **values) -> tuple[str, list[str]]:
    """The page's text, and what the report said was missing."""
    said: list[str] = []
    return build_report(config(root, out, **values), torch.device("cpu"), said.append).read_text(), said


@pytest.fixture(scope="module", autouse=True)
def teachers():
    """The teachers that were asked for; all are the small one of the runs."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "beitv2_fast.weights.build.create_teacher", lambda *given, **_: asked.append(given) or TinyTeacher().eval()
        )
        yield asked


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("report")
    page, said = report(runs, out)
    assert not said
    return page, out


def test_a_report_has_every_section_and_picture(whole):
    page, out = whole
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    assert page.count("<img ") == len(PICTURES)
    for name in PICTURES:
        assert Image.open(out / f"{name}.png").size == Image.open(out / f"{name}_dark.png").size


def test_a_report_refers_to_nothing_outside_itself(whole):
    page, out = whole
    references = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(references) == 2 * len(PICTURES) + len(SECTIONS)
    assert all(r.startswith(("data:image/", "#")) for r in references)
    assert "<script" not in page and "url(" not in page and "@import" not in page
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".png") == ["report.html"]


def test_words_of_others_are_shown_as_text(whole):
    page, _ = whole
    assert "License: &lt;CC BY&gt;" in page and "A note on &lt;this&gt;." in page


def test_the_results_are_said_as_they_are(whole):
    page, _ = whole
    assert "0.700 ± 0.010" in page and "is 0.100 below raw pixels (0.800)" in page


def test_the_report_says_how_it_was_made_and_what_the_larger_class_would_give(whole):
    page = whole[0]
    assert '<td>tokenizer</td><td class="number">1.5</td><td class="number">2</td>' in page
    assert "beitv2-fast 1 on 2 x CPU" in page and "python a.py --out &lt;mine&gt;" in page
    assert "The largest class has 68.7% of the test images." in page


def test_commands_in_its_text_are_set_as_code(whole):
    text = re.sub("<pre>.*?</pre>", "", whole[0], flags=re.DOTALL)
    assert "<code>beitv2-fast explore</code>" in text and "`" not in text


def test_images_are_those_of_the_trainings_where_none_are_named(runs, tmp_path):
    moved = tmp_path / "runs"
    shutil.copytree(runs, moved)
    for name in ("tokenizer", "pretrain"):
        file = moved / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "data": str(moved / "data")}))
    found = gather(config(moved, tmp_path / "out", data=None, teacher=False), torch.device("cpu"))
    assert found.data == moved / "data" and found.images.root == moved / "data" / "train"
    with pytest.raises(UserError, match="Name their folder with --data"):
        nothing = {"data": None, "tokenizer": tmp_path / "no", "pretrain": tmp_path / "no"}
        gather(config(moved, tmp_path / "out", **nothing), torch.device("cpu"))


def test_a_difference_within_the_noise_is_no_difference():
    rows = [("pre-trained", 0.72, 0.02), ("untrained", 0.71, 0.01), ("teacher", 0.5, 0.0)]
    rows = [{"features": name, "mean": mean, "std": std} for name, mean, std in rows]
    assert verdict({"rows": rows}) == [
        "The pre-trained backbone's better feature (0.720) is about as good as the untrained backbone (0.710) and "
        "0.220 above the teacher (0.500)."
    ]


def test_a_difference_that_the_number_of_test_images_leaves_open_is_no_difference():
    rows = [{"features": name, "mean": mean, "std": 0.0} for name, mean in (("pre-trained", 0.75), ("untrained", 0.73))]
    assert verdict({"rows": rows})[0].endswith("is 0.020 above the untrained backbone (0.730).")
    assert verdict({"rows": rows, "error": 0.0201})[0].endswith("is about as good as the untrained backbone (0.730).")


PROBED = {
    "rows": [
        {"features": "pre-trained, x", "mean": 0.75, "std": 0.0123, "knn": {"5": 0.61}, "knn_std": {"5": 0.0}},
        {"features": "untrained, x", "mean": 0.7, "std": 0.01, "knn": {"5": 0.6}, "knn_std": {"5": 0.02}},
    ],
    "images": {"train": 3, "test": 1655},
    "error": 0.0184,
}


def test_linear_probe_and_neighbors_stand_side_by_side_in_the_probe_s_table():
    assert probe_cells(PROBED) == [
        ["features", "linear", "5-NN"],
        ["pre-trained, x", "0.750 ± 0.012", "0.610"],
        ["untrained, x", "0.700 ± 0.010", "0.600 ± 0.020"],
    ]
    html = results_table({**PROBED, "chance": 0.5})
    assert all(cell in html for cells in probe_cells(PROBED) for cell in cells) and "width: 50.0%" in html
    assert sampling_error(PROBED) == ["The 1,655 test images leave each number a standard error of up to 0.018."]
    assert sampling_error({"rows": []}) == []


def test_a_second_report_replaces_the_first(runs, whole, tmp_path):
    _, out = whole
    shutil.copytree(out, tmp_path / "report")
    assert report(runs, tmp_path / "report") == ((out / "report.html").read_text(), [])
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(p.name for p in out.iterdir())


def test_missing_parts_are_said_and_the_rest_is_there(runs, tmp_path):
    page, said = report(runs, tmp_path / "report", probe=tmp_path / "none", pretrain=tmp_path / "never")
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    assert "The probe has not been run yet" in page and "never is no run folder" in page
    assert len(said) == 2
    made = {p.stem for p in (tmp_path / "report").glob("*.png") if not p.stem.endswith("_dark")}
    assert made == {"tokenizer", "codebook", "token_maps", "similarity", "codes"}


def test_a_teacher_that_cannot_be_had_is_said_in_its_place(runs, tmp_path, monkeypatch):
    def fail(*given, **_):
        raise UserError("no weights here.")

    monkeypatch.setattr("beitv2_fast.weights.build.create_teacher", fail)
    page, said = report(runs, tmp_path / "report")
    assert said == ["report: The tokenizer's teacher cannot be loaded: no weights here."]
    assert "no weights here" in page and not (tmp_path / "report" / "similarity.png").exists()


def test_a_teacher_of_another_width_is_not_compared_with(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTeacher, "dim", 13)
    page, said = report(runs, tmp_path / "report")
    assert "features of width 13" in page and len(said) == 1


def test_a_report_does_without_the_teacher_if_told(runs, tmp_path, teachers):
    teachers.clear()
    page, said = report(runs, tmp_path / "report", teacher=False, max_images=6)
    assert not (said or teachers) and "has not been loaded, as asked" in page
    assert "of 6 of 8 training photographs" in page  # a sample, or some left out


def test_runs_are_compared_by_their_curves(runs, tmp_path):
    shutil.copytree(runs / "tokenizer", tmp_path / "second")
    compare = (runs / "tokenizer", tmp_path / "second")
    page, said = report(runs, tmp_path / "report", compare=compare)
    assert not said and "Curves of tokenizer, second" in page and (tmp_path / "report" / "compared.png").is_file()
    (tmp_path / "second" / "metrics.jsonl").unlink()
    assert report(runs, tmp_path / "report", compare=compare)[1] == [
        "report: second has no training log (metrics.jsonl)."
    ]


def test_a_training_without_a_checkpoint_yet_still_shows_its_curves(runs, tmp_path):
    shutil.copytree(runs / "tokenizer", tmp_path / "tokenizer", ignore=shutil.ignore_patterns("step_*"))
    page, said = report(runs, tmp_path / "report", tokenizer=tmp_path / "tokenizer")
    assert "has no checkpoint yet" in page and len(said) == 1
    assert (tmp_path / "report" / "tokenizer.png").is_file() and not (tmp_path / "report" / "codes.png").exists()


def test_images_without_classes_are_named_by_their_files(runs, tmp_path):
    for i, path in enumerate(sorted((runs / "data" / "train" / "a").iterdir())):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "flat" / f"photo_{i}.png")
    page, said = report(runs, tmp_path / "report", data=tmp_path / "flat")
    assert not said and "which the trainings have seen" in page


def test_of_repeated_steps_the_last_line_counts_and_a_cut_line_does_not(tmp_path):
    lines = [tokenizer_line(s) for s in (1, 2, 3)] + [tokenizer_line(2, loss=7.0)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == [1, 2, 3] and metrics[1]["loss"] == 7.0


def test_an_unfinished_training_is_called_so(runs, tmp_path):
    shutil.copytree(runs / "pretrain", tmp_path / "pretrain")
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(json.dumps(pretrain_line(1)) + "\n")
    page, _ = report(runs, tmp_path / "report", pretrain=tmp_path / "pretrain")
    assert "not finished: epoch 0.5 of 2" in page


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer": "pretrain"}, "is the run folder of a pre-training"),
        ({"data": "nowhere"}, "does not exist"),
        ({"out": "data"}, "is no report's folder"),
        ({"tokenizer": "no", "pretrain": "no", "probe": "no"}, "nothing to report on"),
    ],
)
def test_a_wrong_folder_is_refused(runs, tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        report(runs, **{"out": tmp_path / "report", **{name: runs / folder for name, folder in changed.items()}})
    assert not (tmp_path / "report").exists()


def test_a_tokenizer_that_the_student_did_not_learn_from_is_refused(runs, tmp_path):
    other = TokenizerConfig(**SHAPE, num_codes=9, code_dim=4, decoder_depth=1)
    write_run(tmp_path / "tokenizer", other, build_tokenizer(other, 12), [])
    with pytest.raises(UserError, match="do not belong together"):
        gather(config(runs, tmp_path / "report", tokenizer=tmp_path / "tokenizer"), torch.device("cpu"))


def test_a_sample_shows_every_class(runs):
    images = find_images(runs / "data", "train")
    chosen = sample_images(images, 4, seed=0)
    assert sorted(images.labels[i] for i in chosen) == [0, 0, 1, 1]
    assert sample_images(images, 100, seed=0) == list(range(8))
