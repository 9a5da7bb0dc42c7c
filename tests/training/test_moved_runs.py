"""Runs whose data or tokenizer moved resume to the same bits, others are refused, failed starts leave no trouble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from beitv2_fast.runs.checkpoints import read_weights, save_weights
from beitv2_fast.train.finetune import FinetuneTask
from beitv2_fast.training import images as training_images
from beitv2_fast.training import resume

from ..support.small_runs import small_runs
from ..support.training import assert_same_bits, call, last_weights

SHAPE = "--image-size 32 --patch-size 8 --dim 16 --depth 2 --heads 2 --batch-size 4 --workers 0 --device cpu".split()
PRETRAIN = [*SHAPE, *"--early-layer 1 --num-masked 6 --min-mask-patches 2 --epochs 2 --save-every 2".split()]
FINETUNE = [*SHAPE, *"--epochs 2 --save-every 2".split()]


def go(stage: str, *options: object) -> int:
    return call(stage, "--preset", "demo", *(PRETRAIN if stage == "pretrain" else FINETUNE), *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """data, tokenizer, pretrain (untrained), and the finished runs student and tuned, of 4 steps each."""
    root = small_runs(tmp_path_factory.mktemp("moved"))
    assert go("pretrain", "--data", root / "data", "--tokenizer", root / "tokenizer", "--out", root / "student") == 0
    assert go("finetune", "--data", root / "data", "--weights", root / "pretrain", "--out", root / "tuned") == 0
    return root


@pytest.fixture
def world(finished, tmp_path) -> Path:
    """A copy of all that, in which the runs have lost their last two steps."""
    shutil.copytree(finished, tmp_path / "w")
    for run in ("student", "tuned"):
        shutil.rmtree(tmp_path / "w" / run / "checkpoints" / "step_00000004")
        file = tmp_path / "w" / run / "config.json"  # as if it had always been here
        file.write_text(file.read_text().replace(str(finished), str(tmp_path / "w")))
    return tmp_path / "w"


def state(run: Path) -> dict[str, bytes]:
    files = (file for file in run.rglob("*") if file.is_file() and file.name not in (".lock", "log.txt"))
    return {str(file): file.read_bytes() for file in files if not file.name.startswith("images")}


def of_an_earlier_version(run: Path) -> None:
    (run / "inputs.json").unlink(missing_ok=True)
    for file in run.glob("checkpoints/*/training.json"):
        about = json.loads(file.read_text())
        del about["image_count"]
        file.write_text(json.dumps(about))
    config = json.loads((run / "config.json").read_text())
    del config["stage"]
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_whose_data_moved_and_whose_tokenizer_is_named_otherwise_resumes_to_the_same_bits(
    finished, world, monkeypatch, capsys, earlier
):
    if earlier:
        for run in ("student", "tokenizer"):
            of_an_earlier_version(world / run)
    (world / "data").rename(world / "elsewhere")
    monkeypatch.chdir(world)
    for data in ("elsewhere", world / "elsewhere"):
        assert go("pretrain", "--data", data, "--tokenizer", "tokenizer", "--out", world / "student") == 0
    said = capsys.readouterr().out
    assert "resumed at step 2 of 4" in said and "warning: the images" not in said and "already complete" in said
    assert_same_bits(world / "student", finished / "student")
    assert json.loads((world / "student" / "config.json").read_text())["data"] == str(world / "elsewhere")


def test_a_run_whose_tokenizer_or_start_moved_resumes_to_the_same_bits(finished, world, capsys):
    for name in ("tokenizer", "pretrain"):
        (world / name).rename(world / f"my_{name}")
    data = ["--data", world / "data"]
    assert go("pretrain", *data, "--tokenizer", world / "my_tokenizer", "--out", world / "student") == 0
    assert go("finetune", *data, "--weights", world / "my_pretrain", "--out", world / "tuned") == 0
    assert capsys.readouterr().out.count("resumed at step 2 of 4") == 2
    for run in ("student", "tuned"):
        assert_same_bits(world / run, finished / run)


def other_name(image: Path) -> None:
    image.rename(image.with_name("new.png"))


def other_size(image: Path) -> None:
    Image.new("RGB", (40, 48)).save(image)


@pytest.mark.parametrize("change", [other_name, other_size])
def test_other_images_at_another_place_are_refused_and_nothing_changes(world, capsys, change):
    shutil.copytree(world / "data", world / "other")
    change(world / "other" / "train" / "a" / "0.png")
    before = state(world / "student")
    command = ["--data", world / "other", "--tokenizer", world / "tokenizer", "--out", world / "student"]
    for _ in range(2):  # the first one must not make the second one right
        assert go("pretrain", *command) == 2
        assert "was trained on other images than the 8 in" in capsys.readouterr().err
    assert state(world / "student") == before


def test_masks_belong_to_what_is_compared(tmp_path):
    images = SimpleNamespace(paths=["a"], labels=None, spans=[(0, 9)])
    masks = SimpleNamespace(root=tmp_path, paths=["a.png"])
    (tmp_path / "a.png").write_bytes(b"mask")
    before = resume.images_hash(SimpleNamespace(images=images, masks=masks))
    assert before == resume.images_hash(SimpleNamespace(images=images, masks=masks))
    (tmp_path / "a.png").write_bytes(b"another")
    assert before != resume.images_hash(SimpleNamespace(images=images, masks=masks))


def test_images_that_changed_where_they_are_are_said_with_their_numbers(world, capsys):
    Image.new("RGB", (40, 48)).save(world / "data" / "train" / "a" / "new.png")
    command = ["--data", world / "data", "--tokenizer", world / "tokenizer", "--out", world / "student"]
    assert go("pretrain", *command) == 0
    said = capsys.readouterr().out
    assert "warning: the images are others than at step 2" in said and "9 now, 8 then" in said


def test_images_replaced_under_their_names_are_said_also_if_only_the_relative_path_is_the_old_one(
    world, monkeypatch, capsys
):
    monkeypatch.chdir(world)
    other_size(Path("data/train/a/0.png"))
    command = ["--data", "data", "--tokenizer", world / "tokenizer", "--out", world / "student"]
    assert go("pretrain", *command) == 0
    assert "warning: the images are others than at step 2" in capsys.readouterr().out
    assert go("pretrain", *command) == 0
    assert "warning" not in capsys.readouterr().out
    (world / "sub").mkdir()
    shutil.copytree("data", "sub/data")
    other_size(Path("sub/data/train/b/0.png"))
    monkeypatch.chdir("sub")
    config = world / "student" / "config.json"
    assert json.loads(config.read_text())["data"] == "data"
    assert go("pretrain", *command) == 0
    assert "warning: the images are others than at step 4" in capsys.readouterr().out


def change_weights(run: Path) -> None:
    file = run / "checkpoints" / "step_00000004" / "model.safetensors"
    save_weights({name: value + 1 for name, value in read_weights(file).items()}, file)


def test_a_tokenizer_that_was_trained_on_is_refused_at_its_old_place_too(world, capsys):
    shutil.copytree(world / "tokenizer", world / "other")
    change_weights(world / "other")
    before = state(world / "student")
    command = ["--data", world / "data", "--out", world / "student", "--tokenizer"]
    assert go("pretrain", *command, world / "other") == 2
    assert f"tokenizer: {world / 'tokenizer'} there, {world / 'other'} now" in capsys.readouterr().err
    change_weights(world / "tokenizer")
    assert go("pretrain", *command, world / "tokenizer") == 2
    assert f"other weights than at the start, in {world / 'tokenizer'}" in capsys.readouterr().err
    assert state(world / "student") == before


def test_weights_that_a_fine_tuning_started_from_may_go_on_but_not_be_others(world, capsys):
    shutil.copytree(world / "pretrain", world / "other")
    change_weights(world / "other")
    command = ["--data", world / "data", "--out", world / "tuned", "--weights"]
    assert go("finetune", *command, world / "other") == 2
    assert "another config (weights: " in capsys.readouterr().err
    change_weights(world / "pretrain")
    assert go("finetune", *command, world / "pretrain") == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_refuses_a_tokenizer_at_another_place(world, capsys):
    of_an_earlier_version(world / "student")
    (world / "tokenizer").rename(world / "my_tokenizer")
    command = ["--data", world / "data", "--tokenizer", world / "my_tokenizer", "--out", world / "student"]
    assert go("pretrain", *command) == 2
    assert "another config (tokenizer: " in capsys.readouterr().err


# options that are wrong whatever the images are -> what is said
WRONG = {
    "finetune": {
        ("--depth", 3): "has another shape than these options: give it as --depth 2",
        ("--weights", "missing.pth"): "no checkpoint file missing.pth",
        ("--deepspeed-config", "missing.json"): "missing.json cannot be read",
        ("--attention", "xformers"): "attention 'xformers' cannot run here",
        ("--val", "missing"): "folder missing does not exist",
        ("--val", "data/test/a"): "has no classes, but the classifier knows 2",
        ("--data", "data/train/a"): "needs at least two class folders",
    },
    "pretrain": {
        ("--knn-data", "missing"): "missing needs the folders train/CLASS and test/CLASS",
        ("--knn-data", "other"): "train has the classes ['a', 'c'], test has ['a', 'b']",
        ("--tokenizer", "vqkd_misspelled"): "or a name that `beitv2-fast models` lists",
        ("--loss-on", "aggregation", "--aggregation-depth", 0): "needs that branch",
        ("--attention", "xformers"): "attention 'xformers' cannot run here",
    },
    "segment": {
        ("--depth", 3): "has another shape than these options: give it as --depth 2",
        ("--layers", 0, 1): "Change --layers or --depth",
        ("--scale-range", 2, 1): "its first number must not be above its second",
        ("--val", "missing"): "--val missing has no images with masks",
    },
    "tokenizer": {("--val", "missing"): "folder missing does not exist"},
}
STARTS = {
    "pretrain": ("--tokenizer", "tokenizer"),
    "tokenizer": ("--teacher-image-size", 128),
    "finetune": ("--weights", "pretrain"),
    "segment": ("--weights", "pretrain"),
}
CASES = [(stage, wrong) for stage, cases in WRONG.items() for wrong in cases]


@pytest.mark.parametrize(("stage", "wrong"), CASES, ids=lambda x: x if isinstance(x, str) else x[0][2:])
def test_wrong_options_and_weights_are_told_before_images_are_decoded_and_leave_no_folder(
    world, monkeypatch, capsys, stage, wrong
):
    if wrong[0] == "--deepspeed-config":
        pytest.importorskip("deepspeed")
    monkeypatch.setattr(training_images, "check_images", lambda *_, **__: pytest.fail("images were decoded"))
    monkeypatch.chdir(world)
    shutil.copytree("data", "other")
    Path("other/train/b").rename("other/train/c")
    assert go(stage, *STARTS[stage], "--data", "data", "--out", "new", *wrong) == 2
    assert WRONG[stage][wrong] in capsys.readouterr().err
    assert not (world / "new").exists()


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("linear_probe", "--run pretrain --data data --evaluate", "has no classifiers.safetensors"),
        ("linear_probe", "--run pretrain --data data --evaluate --protocol blocks", "has no checkpoint yet"),
        ("linear_probe", "--run pretrain --data other", "train has the classes ['a', 'c'], test has ['a', 'b']"),
        ("evaluate", "--model tuned --data data/test missing", "folder missing does not exist"),
        ("evaluate", "--model tuned --data data/test other/train", "has the classes c, but"),
        ("evaluate", "--model tuned --data data/test --classes missing", "--classes missing does not exist"),
    ],
)
def test_what_a_probe_or_an_evaluation_lacks_is_told_before_images_are_decoded(
    world, monkeypatch, capsys, stage, options, said
):
    monkeypatch.setattr(training_images, "check_images", lambda *_, **__: pytest.fail("images were decoded"))
    monkeypatch.chdir(world)
    shutil.copytree("data", "other")
    Path("other/train/b").rename("other/train/c")
    assert call(stage, "--workers", 0, "--device", "cpu", "--out", "new", *options.split()) == 2
    assert said in capsys.readouterr().err
    assert not (world / "new").exists()


def test_a_start_that_came_to_nothing_does_not_refuse_the_corrected_command(finished, world, monkeypatch, capsys):
    """NaN in the first steps advises a lower --lr, and the log has lines already."""
    command = ["--data", world / "data", "--weights", world / "pretrain", "--out", world / "new"]
    with monkeypatch.context() as patch:
        loss, calls = FinetuneTask.loss, []

        def nan_from_the_second(*given):
            value, metrics = loss(*given)
            calls.append(value)
            return (value if len(calls) == 1 else value * float("nan")), metrics

        patch.setattr(FinetuneTask, "loss", nan_from_the_second)
        wrong = ["--lr", 1, "--log-every", 1, "--stop-after-bad", 1, "--save-every", 100]
        assert go("finetune", *command, *wrong) == 2
    assert "Otherwise lower --lr" in capsys.readouterr().err and (world / "new" / "metrics.jsonl").is_file()
    assert not (world / "new" / "checkpoints").exists()
    assert go("finetune", *command) == 0
    assert_same_bits(world / "new", finished / "tuned")
    lines = [json.loads(line) for line in (world / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4]  # and not those of the other config
    assert last_weights(world / "new")
