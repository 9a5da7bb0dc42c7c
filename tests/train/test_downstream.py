"""The table of backbones and the ablations: every step of a tiny one runs, and the tables have what it left."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from beitv2_fast.config import presets
from beitv2_fast.config.downstream import SEGMENT
from beitv2_fast.config.options import parse
from beitv2_fast.train.experiments import ablate, downstream
from beitv2_fast.train.experiments.runner import Outcome, Step, record_file
from beitv2_fast.train.experiments.stages import SmallScale, flags

from ..support.downstream import write_colors, write_scenes
from ..support.training import MODULES, call

TINY = SmallScale(
    image_size=32, patch_size=8, dim=24, depth=4, heads=2, num_codes=16, early_layer=2, tokenizer_epochs=1,
    pretrain_epochs=1, finetune_epochs=1, segment_epochs=1, probe_epochs=2, batch_size=8, quality_images=4,
)  # fmt: skip
OPTIONS = flags(**dataclasses.asdict(TINY))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("downstream")
    write_colors(folder / "images" / "train", 8)
    write_colors(folder / "images" / "val", 3)
    write_scenes(folder / "scenes" / "train", 8)
    write_scenes(folder / "scenes" / "val", 2, seed=1)
    return folder


def started(step: Step) -> tuple[str, tuple[str, ...]]:
    """The stage that a step starts by its module, as from a wheel, and its options."""
    python, flag, module, *options = step.command
    assert (python, flag) == (sys.executable, "-m") and module.startswith("beitv2_fast.train.")
    return module.rpartition(".")[2], tuple(options)


def run_here(steps: Iterable[Step], root: Path, jobs: int = 0, **_: object) -> Outcome:
    """``run_steps`` without processes, which take seconds each to import torch."""
    for step in steps:
        if record_file(root, step.name).is_file():
            continue
        stage, options = started(step)
        assert call(stage, *options) == 0, step.name
        record_file(root, step.name).parent.mkdir(parents=True, exist_ok=True)
        about = {"command": list(step.command), "done": True, "attempts": [{"seconds": 2.0, "cpu_seconds": 1.0}]}
        record_file(root, step.name).write_text(json.dumps(about))
    return Outcome()


def test_one_command_gives_the_table_of_all_backbones(data, monkeypatch, capsys):
    monkeypatch.setattr(downstream, "run_steps", run_here)
    where = flags(images=data / "images", scenes=data / "scenes", out=data / "table", seeds=1)
    assert downstream.main([*OPTIONS, *where]) == 0
    found = json.loads((data / "table" / "results.json").read_text())
    rows = found["backbones"]
    assert list(rows) == list(downstream.ROWS.values())
    everything = {column.key for column in downstream.BACKBONE_COLUMNS}
    assert rows[downstream.STUDENT].keys() == rows[downstream.RANDOM].keys() == everything
    assert rows[downstream.ENCODER].keys() == rows[downstream.PLAIN].keys() == everything - {"segment"}
    assert rows[downstream.TEACHER].keys() == {"probe_mean", "knn_mean"}
    assert found["tokenizers"]["VQ-KD"].keys() == {column.key for column in downstream.TOKENIZER_COLUMNS}
    assert found["cpu_seconds"] > 10
    table = (data / "table" / "table.md").read_text()
    assert "| student |" in table and "student > random weights, mIoU: " in table
    assert (data / "table" / "table.png").stat().st_size > 10_000
    # Shown again without running anything, and without the images, the table is the same but for the time.
    monkeypatch.setattr(downstream, "run_steps", None)
    gone = flags(images=data / "gone", scenes=data / "gone", out=data / "table", seeds=1)
    assert downstream.main(["--show", *gone]) == 0
    again = json.loads((data / "table" / "results.json").read_text())
    assert again["backbones"] == rows and again["wall_seconds"] >= found["wall_seconds"]
    assert all(again[key] == found[key] for key in ("cpu_seconds", "machine_after", "config"))  # of when it ran


def test_an_ablation_trains_the_base_once_and_collects_with_the_others(data, monkeypatch):
    ran = []

    def note(steps, root, **how):
        ran.extend(step.name for step in steps if not record_file(root, step.name).is_file())
        return run_here(steps, root)

    monkeypatch.setattr(ablate, "run_steps", note)
    where = flags(images=data / "images", out=data / "ablations")
    assert ablate.main(["masks", *OPTIONS, *where]) == 0
    assert len(ran) == 1 + 3 * 4  # a tokenizer; a pre-training, a probe and a fine-tuning for each mask
    assert ablate.main(["early_layer", "aggregation", *OPTIONS, *where]) == 0
    assert ran[13:] == [
        f"seed0/{stage}-{what}"
        for what in ("early_layer_1", "early_layer_3", "aggregation_depth_0")
        for stage in ("pretrain", "probe", "finetune")
    ]
    found = json.loads((data / "ablations" / "results.json").read_text())
    assert list(found) == ["masks", "early_layer", "aggregation"]
    base = found["masks"]["rows"]["blocks, 40 %"]
    assert found["early_layer"]["rows"]["l = 2"] == base == found["aggregation"]["rows"]["with"]
    assert base.keys() == {"probe_cls", "probe_mean", "knn_cls", "knn_mean", "finetune"}
    tuned = json.loads((data / "ablations" / "seed0" / "finetune" / "results.json").read_text())
    assert base["finetune"] == [tuned["weights"]["top1"]]
    # A tokenizer is judged by itself, too; without students only by itself.
    assert ablate.main(["decoder_depth", *OPTIONS, *where, "--no-students"]) == 0
    stages = ("quality", "encoder", "tokenizer-decoder_depth_3", "quality-decoder_depth_3", "encoder-decoder_depth_3")
    assert ran[22:] == [f"seed0/{stage}" for stage in stages]
    judged = json.loads((data / "ablations" / "results.json").read_text())["decoder_depth"]["rows"]["depth 3"]
    assert {"used_codes", "perplexity", "similarity", "encoder_knn_mean"} < judged.keys()
    assert "probe_cls" not in judged
    # With scenes every student is segmented, too, and the rest is not run again.
    assert ablate.main(["aggregation", *OPTIONS, *where, *flags(scenes=data / "scenes")]) == 0
    assert ran[27:] == ["seed0/segment", "seed0/segment-aggregation_depth_0"]
    rows = json.loads((data / "ablations" / "results.json").read_text())["aggregation"]["rows"]
    found = json.loads((data / "ablations" / ran[28] / "results.json").read_text())
    assert rows["without"]["segment"] == [found["weights"]["miou"]] and rows["with"]["finetune"] == base["finetune"]
    assert "| student: fine-tuned, % | student: mIoU, % |" in (data / "ablations" / "aggregation.md").read_text()
    monkeypatch.setattr(ablate, "run_steps", None)
    before = json.loads((data / "ablations" / "results.json").read_text())
    assert ablate.main(["masks", "--show", *flags(out=data / "ablations", images=data / "gone")]) == 0
    assert json.loads((data / "ablations" / "results.json").read_text()) == before
    assert (data / "ablations" / "masks.png").is_file() and (data / "ablations" / "masks.md").is_file()


@pytest.mark.parametrize("model", ["none", "base", "large"])
@pytest.mark.parametrize("name", list(ablate.ABLATIONS))
def test_every_command_of_an_ablation_is_understood(name, model, tmp_path):
    """Each option exists and has a value that it may have; the variants' commands differ."""
    config = dataclasses.replace(ablate.BASE, out=tmp_path, model=model)
    made = ablate.plan([name], config, tmp_path, tmp_path)
    known = {"tokenizer": presets.TOKENIZER, "pretrain": presets.PRETRAIN, "linear_probe": presets.PROBE}
    known |= {"finetune": presets.FINETUNE, "segment": SEGMENT}
    for step in made.steps.values():
        stage, options = started(step)
        assert stage in MODULES
        if stage in known:
            parse(type(known[stage]["demo"]), known[stage], options)
    probes = [runs["probe"] for runs in made.runs.values()]
    assert len(set(probes)) == len(probes) == len(ablate.ablations(model)[name].variants)
    assert any(runs["probe"] == "seed0/probe" for runs in made.runs.values())  # one of them is the base


@pytest.mark.parametrize("model", ["base", "large"])
def test_of_a_paper_s_size_an_ablation_changes_its_presets_in_what_it_names_alone(model, tmp_path):
    config = dataclasses.replace(ablate.BASE, out=tmp_path, model=model, batch_size=64)
    made = ablate.plan(["mask_ratio", "decoder_depth"], config, tmp_path / "images", tmp_path / "scenes")
    free = {"data", "out", "seed", "epochs", "batch_size", "loader", "in_memory", "workers", "device", "log_every"}
    free |= {"save_every", "keep_checkpoints", "tokenizer", "weights", "eval_every", "overlays", "steps"}

    def changed(step: str, all_presets: dict) -> dict:
        found = parse(type(all_presets[model]), all_presets, started(made.steps[step])[1])[0]
        return {n: v for n, v in vars(found).items() if n not in free and v != getattr(all_presets[model], n)}

    assert changed("seed0/pretrain-masked_0.2", presets.PRETRAIN) == {"num_masked": 39}
    assert changed("seed0/tokenizer-decoder_depth_1", presets.TOKENIZER) == {"decoder_depth": 1}
    for name, all_presets in (("pretrain", presets.PRETRAIN), ("tokenizer", presets.TOKENIZER)):
        assert changed(f"seed0/{name}", all_presets) == {}
    assert changed("seed0/finetune", presets.FINETUNE) == changed("seed0/segment", SEGMENT) == {}


def test_an_unknown_ablation_is_refused_with_a_list_of_those_that_there_are():
    with pytest.raises(ablate.UserError, match=r"no ablation colors(.|\n)*codebook_size"):
        ablate.main(["colors"])


@pytest.mark.parametrize(("device", "gpu", "jobs", "at_once"), [
    ("auto", False, 0, 0), ("auto", True, 0, 1), ("cpu", True, 0, 0), ("cuda", True, 0, 1), ("auto", True, 3, 3),
])  # fmt: skip
def test_on_a_gpu_one_step_runs_at_a_time_unless_told(monkeypatch, device, gpu, jobs, at_once):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert SmallScale(device=device, jobs=jobs).steps_at_once == at_once
