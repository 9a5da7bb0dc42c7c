"""The command line: what a person types, what it prints, and what it does with mistakes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beitv2_fast import __version__, cli, create_model, distributed
from beitv2_fast.config.downstream import SEGMENT, EvaluateConfig, FinetuneConfig, ProbeConfig, SegmentConfig
from beitv2_fast.config.options import parse
from beitv2_fast.config.presets import EVALUATE, FINETUNE, PRETRAIN, PROBE, REPORT, TOKENIZER
from beitv2_fast.config.show import ReportConfig
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.weights.files import read

from ..support.small_runs import small_runs
from ..support.training import ENVIRONMENT
from ..support.weights import assert_same_state, classifier, images, student, tokenizer


def command(*words: object) -> int:
    """The command in this process: its exit code."""
    with pytest.raises(SystemExit) as exit:
        distributed.run_main(lambda: cli.run_command([str(word) for word in words]))
    return exit.value.code or 0


@pytest.fixture
def published(tmp_path):
    """A student as the published files hold it, with the extras of a training around it."""
    torch.save({"model": student().state_dict(), "epoch": 300}, tmp_path / "published.pth")
    return tmp_path / "published.pth"


def test_a_student_goes_to_every_format_and_back(tmp_path, published):
    file = published
    for number, target in enumerate(("timm", "transformers", "transformers_modules", "beitv2_fast", "published")):
        out = tmp_path / f"{number}.safetensors"
        assert command("convert", file, out, "--to", target, "--force") == 0
        file = out
    assert_same_state(read(file).ours, student().state_dict())


def test_the_output_names_what_the_other_format_has_no_place_for(tmp_path, published, capsys):
    assert command("convert", published, tmp_path / "timm.safetensors", "--to", "timm") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("mask_token", "lm_head.weight", "cls_pt_layers.0-1.norm1.weight"))
    assert (tmp_path / "timm.extras.safetensors").is_file()


def test_a_classifier_becomes_a_folder_for_transformers_and_comes_back(tmp_path, capsys):
    model = classifier()
    torch.save(model.state_dict(), tmp_path / "c.pth")
    assert command("convert", tmp_path / "c.pth", tmp_path / "hf", "--to", "transformers") == 0
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip
    assert command("convert", tmp_path / "hf", tmp_path / "back.safetensors", "--to", "beitv2_fast") == 0
    again = create_model(checkpoint=tmp_path / "back.safetensors")
    assert torch.equal(again(images()), model(images()))


MISTAKES = [
    ("convert nothing.pth out.safetensors --to timm", "there is no checkpoint file nothing.pth"),
    ("convert c.pth c.pth --to timm", "c.pth exists"),
    ("convert c.pth out --to timm", "should end in .safetensors"),
    ("convert t.pth out.safetensors --to timm", "timm has no tokenizer"),
    ("convert text.pth out.safetensors --to timm", "cannot be read as a checkpoint"),
    ("convert other.pth out.safetensors --to timm", "no weights of a BEiT v2 model"),
    ("convert c.pth out.safetensors --to beitv2_fast --from transformers", "read as 'transformers'"),
    ("convert no_tables.pth out --to transformers", "number of attention heads"),
    ("convert images out.safetensors --to timm", "is no run folder"),
    ("encode nothing --tokenizer t.safetensors", "The image folder nothing does not exist"),
    ("encode images --tokenizer nothing", "there is no checkpoint file nothing"),
    ("encode images --tokenizer c.pth", "a tokenizer is needed"),
    ("encode images --tokenizer t.safetensors --batch-size 0", "--batch-size is 0, but must be at least 1"),
    ("encode images --tokenizer t.pth --out codes.csv", "should end in .npz or .safetensors"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    torch.save(classifier().state_dict(), folder / "c.pth")
    torch.save(tokenizer().state_dict(), folder / "t.pth")
    torch.save(classifier("absolute").state_dict(), folder / "no_tables.pth")
    torch.save({"conv.weight": torch.ones(2)}, folder / "other.pth")
    (folder / "text.pth").write_text("text")
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_a_mistake_ends_with_one_paragraph_and_code_2(folder, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert command(*words.split()) == 2
    error = capsys.readouterr().err.rpartition("\nerror: ")[2]
    assert said in error and "\n\n" not in error and "Traceback" not in error
    assert sorted(folder.rglob("*")) == before


def test_models_lists_the_names(capsys):
    assert command("models") == 0
    said = capsys.readouterr().out
    assert "beitv2_base_classifier" in said and "vqkd_encoder_base_decoder_3x768x12_clip" in said


@pytest.mark.slow
def test_the_package_is_a_command():
    result = subprocess.run([sys.executable, "-m", "beitv2_fast", "--help"], env=ENVIRONMENT, capture_output=True)
    assert result.returncode == 0 and b"convert" in result.stdout and b"encode" in result.stdout


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pt"])
def test_converting_never_replaces_a_folder_by_a_file(tmp_path, published, capsys, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    assert command("convert", published, tmp_path / name, "--to", "beitv2_fast", "--force") == 2
    assert f"{name} is a folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name != published.name] == [name]
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_converting_never_replaces_a_run_folder(tmp_path, published, capsys):
    run = small_runs(tmp_path) / "pretrain"
    before = sorted(run.rglob("*"))
    assert command("convert", published, run, "--to", "transformers", "--force") == 2
    assert "is no folder of a model for transformers" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


# every command with paths -> what it is given beside them
COMMANDS = {
    "train/tokenizer.py": (TokenizerConfig, TOKENIZER),
    "train/pretrain.py": (PretrainConfig, PRETRAIN),
    "train/finetune.py": (FinetuneConfig, FINETUNE),
    "train/evaluate.py": (EvaluateConfig, EVALUATE),
    "train/segment.py": (SegmentConfig, SEGMENT),
    "train/linear_probe.py": (ProbeConfig, PROBE),
    "train/report.py": (ReportConfig, REPORT),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_tilde_is_the_home_folder_in_every_option_that_is_a_path(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config, presets = COMMANDS[script]
    paths = [f.name for f in dataclasses.fields(config) if "Path" in f.type]
    assert "out" in paths and len(paths) > 1
    made, _ = parse(config, presets, [f"--{name.replace('_', '-')}=~/{name}" for name in paths])
    for name in paths:
        several = "tuple" in next(f.type for f in dataclasses.fields(config) if f.name == name)
        wanted = Path("/home/someone") / name
        assert getattr(made, name) == ((wanted,) if several else wanted)


def test_a_tilde_is_the_home_folder_in_the_paths_of_beitv2_fast(tmp_path, monkeypatch, published):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert command("convert", "~/published.pth", "~/new.safetensors", "--to", "beitv2_fast") == 0
    assert (tmp_path / "new.safetensors").is_file() and not (tmp_path / "~").exists()
    parser = cli.parser()
    given = vars(
        parser.parse_args(["picture", "tokens", "~/run", "-o", "~/x.png", "--data=~/d", "--images", "~/a", "b"])
    )
    assert [given[n] for n in ("run", "out", "data")] == [[tmp_path / "run"], tmp_path / "x.png", tmp_path / "d"]
    assert given["images"] == [tmp_path / "a", Path("b")]
    assert vars(parser.parse_args(["encode", "~/i", "--out=~/c.npz"]))["out"] == tmp_path / "c.npz"


def test_a_tilde_of_a_user_that_is_not_there_is_a_mistake(capsys):
    assert command("encode", "images", "--out=~nobody_at_all/c.npz") == 2
    assert "Write ./~nobody_at_all/c.npz for a name that begins so" in capsys.readouterr().err


@pytest.mark.parametrize("script", COMMANDS)
def test_presets_hide_no_paths(script):
    config, presets = COMMANDS[script]
    for preset in presets.values():
        assert [
            f.name for f in dataclasses.fields(config) if "Path" in f.type and getattr(preset, f.name) != f.default
        ] == []


def pretrain(*options: str) -> PretrainConfig:
    return parse(PretrainConfig, PRETRAIN, list(options))[0]


def test_the_early_layer_and_the_masks_follow_the_shape_unless_they_are_given():
    assert pretrain("--preset", "demo") == PRETRAIN["demo"] and pretrain() == PRETRAIN["base"]
    assert pretrain("--depth", "2").early_layer == 2 and pretrain("--depth", "1").early_layer == 1
    assert (
        pretrain("--depth", "24").early_layer == 18 and pretrain("--preset", "large", "--depth", "16").early_layer == 14
    )
    assert pretrain("--depth", "24", "--early-layer", "21").early_layer == 21
    small = pretrain("--image-size", "112")  # 49 patches of 196
    assert (small.num_masked, small.min_mask_patches, small.early_layer) == (19, 4, 9)
    assert pretrain("--image-size", "112", "--num-masked", "30").num_masked == 30
    huge = pretrain("--patch-size", "14")  # whose masks were scaled by hand
    assert huge.num_masked == PRETRAIN["huge"].num_masked


@pytest.mark.parametrize("script", COMMANDS)
def test_help_has_an_example_that_is_understood(script, capsys):
    config, presets = COMMANDS[script]
    with pytest.raises(SystemExit):
        parse(config, presets, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"example: {config.example}" in said and config.example.startswith(f"python {script} ")
    parse(config, presets, config.example.split()[2:])


def test_help_of_a_training_comes_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, PRETRAIN, ["--help"])
    said = capsys.readouterr().out
    headings = [line.rstrip(":") for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "options", "images", "network", "optimization", "log, checkpoints, faults", "tokenizer", "student", "masks",
        "augmentation", "evaluation",
    ]  # fmt: skip
    assert said.index("network:") < said.index("--depth") < said.index("optimization:") < said.index("--lr ")


MISTYPED = [
    ((PretrainConfig, PRETRAIN), "--early_layer 3", "did you mean --early-layer?"),
    ((TokenizerConfig, TOKENIZER), "--teachr=clip", "did you mean --teacher?"),
    (None, "encode images --tokeniser t", "did you mean --tokenizer?"),
    ((EvaluateConfig, EVALUATE), "--run x", "unrecognized arguments: --run x\n"),  # nothing is like it
]


@pytest.mark.parametrize(("of", "words", "said"), MISTYPED)
def test_a_mistyped_option_gets_a_suggestion_and_no_wall_of_usage(of, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*of, words.split()) if of else cli.run_command(words.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and "unrecognized arguments" in error
    assert of is None or error.count("\n") == 2


def test_every_command_tells_its_version(capsys):
    for command_ in (lambda: parse(PretrainConfig, PRETRAIN, ["--version"]), lambda: cli.run_command(["--version"])):
        with pytest.raises(SystemExit) as ended:
            command_()
        assert not ended.value.code and capsys.readouterr().out == f"beitv2-fast {__version__}\n"
