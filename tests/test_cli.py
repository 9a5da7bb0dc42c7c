"""The command line: what a person types, what it prints, and what it does with mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from beitv2_fast import cli, create_model, distributed
from beitv2_fast.convert.files import read

from .training import ENVIRONMENT
from .weights import assert_same_state, classifier, images, student, tokenizer


def command(*words: object) -> int:
    """The command in this process: its exit code."""
    with pytest.raises(SystemExit) as exit:
        distributed.run_main(lambda: cli.run([str(word) for word in words]))
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


def test_a_tokenizer_becomes_a_published_file(tmp_path):
    model = tokenizer()
    torch.save(model.state_dict(), tmp_path / "t.pth")
    assert command("convert", tmp_path / "t.pth", tmp_path / "p.pth", "--to", "published") == 0
    stored = torch.load(tmp_path / "p.pth", weights_only=True)["model"]
    assert torch.equal(stored["quantize.embedding.weight"], model.quantize.codebook)


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
