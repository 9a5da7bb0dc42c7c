"""Probes in full, fine-tunings, segmentations and evaluations on other sets in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from beitv2_fast.config.downstream import FinetuneConfig
from beitv2_fast.config.options import to_json
from beitv2_fast.show.report.downstream import body, curve_pictures, panels, probe_details, read_downstream
from beitv2_fast.show.sheets import GAP, overlay_sheet

from .test_report import report, runs  # noqa: F401


@pytest.fixture
def tuned(tmp_path) -> Path:
    """The run folder of a fine-tuning that was evaluated twice, as train/finetune.py leaves it, but for checkpoints."""
    run = tmp_path / "tuned"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_json(FinetuneConfig(weights=Path("runs/pretrain")))))
    steps = [{"step": s, "loss": 2 / s, "accuracy": 0.1 * s, "lr": 1e-3, "epoch": s / 2} for s in range(1, 5)]
    lines(run / "metrics.jsonl", steps)
    scores = {s: {"top1": 0.1 * s, "top5": 0.2 * s, "loss": 1.0, "images": 50} for s in (2, 4)}
    lines(
        run / "evaluation.jsonl",
        [{"step": s, **{f"{m}_{k}": v for m in ("weights", "average") for k, v in scores[s].items()}} for s in scores],
    )
    last = {"weights": scores[4], "average": {**scores[4], "top1": 0.45}}
    (run / "results.json").write_text(json.dumps({"step": 4, "classes": 10, **last}))
    return run


def lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(folder: Path) -> Path:
    folder.mkdir()
    row = {"folder": "imagenet-a", "model": "weights", "classes": 200, "top1": 0.5, "top5": 0.75, "images": 7500}
    (folder / "config.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps({"model": "runs/tuned", "rows": [row]}))
    return folder


def segmented(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"weights": null}')
    (folder / "results.json").write_text(json.dumps({"step": 9, "classes": 11, "whole": {"miou": 0.531, "images": 3}}))
    return folder


def test_scores_of_weights_and_average_stand_in_a_table_with_what_they_started_from(tuned):
    html = "".join(body([read_downstream(tuned)], lambda name, caption: []))
    assert "tuned, from runs/pretrain" in html
    for cell in ("40.00%", "45.00%", "80.00%", "50"):
        assert f">{cell}</td>" in html


def test_the_curves_are_the_loss_and_the_top_1_of_each_evaluation_over_epochs(tuned):
    loss, top1, rate = panels(read_downstream(tuned))
    assert [(c.name, c.x, c.y) for c in top1.curves] == [(m, [1.0, 2.0], [0.2, 0.4]) for m in ("weights", "average")]
    assert loss.curves[0].x == [0.5, 1.0, 1.5, 2.0] and rate.curves[0].y == [1.0] * 4


def test_top_5_of_five_classes_is_left_out(tuned):
    content = json.loads((tuned / "results.json").read_text())
    (tuned / "results.json").write_text(json.dumps({**content, "classes": 5}))
    html = "".join(body([read_downstream(tuned)], lambda name, caption: []))
    assert "top-1" in html and "top-5" not in html


def test_evaluations_on_other_sets_and_segmentations_have_their_tables(tmp_path):
    found = [read_downstream(run) for run in (evaluated(tmp_path / "robust"), segmented(tmp_path / "segment"))]
    html = "".join(body(found, lambda name, caption: []))
    assert all(text in html for text in ("imagenet-a, weights", "50.00%", "75.00%", "7,500", "mIoU", "53.10%"))
    assert not any(p.curves for _, panels in curve_pictures(found).values() for p in panels)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "the run has not been evaluated"), ("{", "cannot be read"), ("[]", "holds no scores"), ("{}", "no scores")],
)
def test_a_run_without_usable_results_is_told_of(tuned, content, said):
    (tuned / "results.json").unlink() if content is None else (tuned / "results.json").write_text(content)
    found = read_downstream(tuned)
    assert said in found.problem and not found.models and len(found.metrics) == 4
    assert said in "".join(body([found], lambda name, caption: []))


def test_a_folder_that_is_no_run_is_told_of(tmp_path):
    assert "is no run folder" in read_downstream(tmp_path / "nothing").problem


def test_the_probe_s_few_shots_and_sweep_have_tables():
    few = {"1": {"mean": 0.3, "std": 0.05, "runs": [0.3]}}
    rows = [{"features": "pre-trained, CLS token", "mean": 0.5, "std": 0.0, "few_shot": few}]
    swept = [{"features": "CLS token, block 6", "lr": 0.03, "held_out": 0.4, "top1": 0.55, "top5": None}]
    html = "".join(probe_details({"rows": rows, "sweep": swept}))
    assert all(text in html for text in ("1-shot", "0.300 ± 0.050", "CLS token, block 6", "55.00%", "0.03"))
    assert "top-5" not in html
    assert "90.00%" in "".join(probe_details({"sweep": [{**swept[0], "top5": 0.9}]}))
    assert probe_details({"rows": [{"features": "x", "mean": 0.5, "std": 0.0}]}) == []


def test_the_report_has_their_section_and_curves_where_runs_are_named(runs, tuned, tmp_path):  # noqa: F811
    page, said = report(runs, tmp_path / "report", downstream=(tuned, evaluated(tmp_path / "robust")), teacher=False)
    assert not said and '<section id="downstream">' in page and "Curves of tuned" in page
    assert (tmp_path / "report" / "downstream_0.png").is_file()
    assert not (tmp_path / "report" / "downstream_1.png").exists()


def draw(run: Path, count: int, size: tuple[int, int] = (90, 20)) -> None:
    (run / "overlays").mkdir()
    for i in range(count):
        Image.new("RGB", size, (10 * i, 0, 0)).save(run / "overlays" / f"{i}.png")


def test_a_segmentations_pictures_stand_below_one_another_spread_over_all(tmp_path):
    run = segmented(tmp_path / "segment")
    assert overlay_sheet(run) is None
    draw(run, 6)
    sheet = overlay_sheet(run)
    assert sheet.size == (90, 3 * 20 + 2 * GAP)
    assert [sheet.getpixel((0, i * (20 + GAP)))[0] for i in range(3)] == [0, 20, 40]


def test_the_report_shows_a_segmentations_pictures(runs, tmp_path):  # noqa: F811
    run = segmented(tmp_path / "segment")
    draw(run, 2)
    page, said = report(runs, tmp_path / "report", downstream=(run,), teacher=False)
    assert not said and "Photograph, truth and prediction" in page
    assert (tmp_path / "report" / "overlays_0.png").is_file()
