"""Every command that reads a model reads it by a published name, fetched from a server on 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from beitv2_fast import StudentConfig, TokenizerModelConfig, ViTConfig, cli, create_model
from beitv2_fast.config.downstream import SegmentConfig
from beitv2_fast.config.show import ExploreConfig
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.data.find import find_images
from beitv2_fast.downstream.segmentation.training import start_segmenter
from beitv2_fast.models.student import Student
from beitv2_fast.models.tokenizer import Tokenizer
from beitv2_fast.runs.folder import content
from beitv2_fast.runs.sources import NAMED, locate
from beitv2_fast.show.report.stages import read_stage
from beitv2_fast.show.runs import open_runs
from beitv2_fast.weights import convert
from beitv2_fast.weights.create import open_model

from ..support.release_server import Server, serving, without_digests
from ..support.training import PRETRAIN, TINY, call, write_images
from ..support.weights import randomize

TOKENIZER, STUDENT = "vqkd_encoder_base_decoder_3x768x12_clip", "beitv2_base_patch16_224_pt1k"
SHAPE = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "heads": 3, "mlp_ratio": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """With a small tokenizer and a small student in the place of two published files. A width's heads are known only of
    published widths, so these here are ViT-S's of 384."""
    folder = tmp_path_factory.mktemp("cache")
    shape = {**SHAPE, "dim": 384, "heads": 6, "depth": 1}
    with pytest.MonkeyPatch.context() as patch, serving(folder, patch) as server:
        without_digests(patch)
        torch.manual_seed(0)
        tokenizer = Tokenizer(
            TokenizerModelConfig(ViTConfig(position="absolute", **shape), 1, num_codes=16, code_dim=8, teacher_dim=12)
        )
        tokenizer.quantize.initialized.fill_(True)
        student = Student(StudentConfig(ViTConfig(**SHAPE, layer_scale=0.1), num_codes=16, early_layer=1))
        for name, model in ((TOKENIZER, tokenizer), (STUDENT, randomize(student))):
            server.publish(name, convert(model.state_dict(), "published"), folder)
        yield server


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for label in "ab":
            write_images(folder / split / label, 6)
    return folder


def test_pre_training_learns_the_codes_of_a_published_tokenizer_and_knows_it_again(server, images, tmp_path, capsys):
    run = tmp_path / "run"
    command = [*TINY, *PRETRAIN, "--data", images, "--tokenizer", TOKENIZER, "--out", run]
    assert call("pretrain", *command) == 0, capsys.readouterr()
    assert json.loads((run / "config.json").read_text())["tokenizer"] == TOKENIZER
    assert json.loads((run / "inputs.json").read_text())["tokenizer"] == content(locate(TOKENIZER))
    model, config = open_model(run)
    assert model.config.num_codes == 16 and isinstance(config, PretrainConfig)
    assert call("pretrain", *command) == 0  # finished: the same name is the same tokenizer
    file = tmp_path / "moved.pth"  # and so is the same file elsewhere
    file.write_bytes(locate(TOKENIZER).read_bytes())
    assert call("pretrain", *[file if word == TOKENIZER else word for word in command]) == 0
    other = tmp_path / "other.pth"
    torch.save(
        {"model": {n: v + 1 if v.is_floating_point() else v for n, v in torch.load(file)["model"].items()}}, other
    )
    assert call("pretrain", *[other if word == TOKENIZER else word for word in command]) == 2
    assert "another config (tokenizer:" in capsys.readouterr().err


def test_a_probe_by_a_published_name_finds_the_scores_of_its_file(server, images, tmp_path):
    found = {}
    for source in (STUDENT, locate(STUDENT)):
        run = tmp_path / f"run{len(found)}"
        words = f"--run {source} --data {images} --out {run} --workers 0 --no-exact --epochs 2 --shots 1"
        assert call("linear_probe", *words.split(), "--device", "cpu") == 0
        found[str(source)] = json.loads((run / "results.json").read_text())
    by_name, by_file = found.values()
    assert by_name["rows"] == by_file["rows"] and by_name["rows"][0]["features"].startswith("pre-trained")
    assert "captions of images" in by_name["notes"][0]  # of the tokenizer's teacher, which the name tells


def test_encode_by_a_published_name_writes_the_tokenizer_s_codes(server, images, tmp_path):
    out = tmp_path / "codes.npz"
    assert cli.run_command(["encode", str(images / "test"), "--tokenizer", TOKENIZER, "--out", str(out), "--workers",
                            "0", "--device", "cpu", "--precision", "fp32"]) == 0  # fmt: skip
    from beitv2_fast import read_images

    model = create_model(checkpoint=TOKENIZER)
    paths = find_images(images / "test").paths
    view = read_images([images / "test" / path for path in paths], size=32)
    assert torch.equal(torch.from_numpy(numpy.load(out)["codes"].astype("int64")).flatten(1), model.encode(view))


def test_a_segmentation_starts_from_a_published_student(server):
    said: list[str] = []
    shape = {name: SHAPE[name] for name in ("image_size", "patch_size", "dim", "depth", "heads")}
    model = start_segmenter(SegmentConfig(weights=Path(STUDENT), **shape), 3, said.append)
    assert said[0].startswith(f"weights from {STUDENT}; not in the weights")
    assert torch.equal(model.blocks[0].mlp.fc1.weight, create_model(checkpoint=STUDENT).blocks[0].mlp.fc1.weight)


def test_convert_by_a_published_name_writes_its_weights(server, tmp_path):
    out = tmp_path / "student.safetensors"
    assert cli.run_command(["convert", STUDENT, str(out), "--to", "beitv2_fast"]) == 0
    assert create_model(checkpoint=out).config == create_model(checkpoint=STUDENT).config


def test_a_fine_tuning_starts_from_a_published_student(server, images, tmp_path, capsys):
    words = [*TINY, "--weights", STUDENT, "--data", images, "--out", tmp_path / "run", "--dim", 48, "--heads", 3]
    assert call("finetune", *words, "--epochs", 1) == 0
    assert f"weights from {STUDENT}; not in the weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["weights"] == content(locate(STUDENT))


def test_a_report_of_published_models_has_their_codes_and_guesses(server, images, tmp_path, capsys):
    words = f"--tokenizer {TOKENIZER} --pretrain {STUDENT} --data {images} --out {tmp_path / 'report'} --workers 0"
    from beitv2_fast.train import report

    assert report.main([*words.split(), "--no-teacher", "--device", "cpu", "--scale", "0.5"]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Hidden codes named right" in page and "Codes used" in page
    assert "Options of the" not in page  # nobody trained them here


def test_the_pages_of_a_published_student_have_the_tokenizer_that_it_learned_from(server, images):
    runs = open_runs(Path(STUDENT), ExploreConfig(data=images, device="cpu"))
    assert isinstance(runs.student, Student) and runs.tokenizer.config == create_model(checkpoint=TOKENIZER).config
    assert runs.settings.num_masked == round(75 / 196 * 16)


def test_a_picture_by_a_published_name_is_that_of_its_file(server, images, tmp_path):
    pictures = []
    for source in (TOKENIZER, str(locate(TOKENIZER))):
        out = tmp_path / f"{len(pictures)}.png"
        words = f"picture tokens {source} -o {out} --data {images} --device cpu --scale 0.5 --count 2"
        assert cli.run_command(words.split()) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_the_config_of_a_published_model_is_the_paper_s(server):
    assert read_stage(Path(TOKENIZER), Tokenizer).config == TokenizerConfig(
        teacher="clip", dim=384, depth=1, heads=6, image_size=32, patch_size=8, num_codes=16, code_dim=8,
        decoder_depth=1,
    )  # fmt: skip
    assert read_stage(Path(STUDENT), Student).config.tokenizer == Path(TOKENIZER)


def test_models_lists_every_published_name_with_its_size_and_what_it_is(capsys):
    assert cli.run_command(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, published in NAMED.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert f"{published.millions} M" in line and published.what in line


def test_an_evaluation_by_a_published_name_reads_its_classifier(server, images, tmp_path, capsys):
    name = "beitv2_base_patch16_224_pt1k_ft1k"
    model = create_model("beitv2_base_classifier", **{**SHAPE, "num_classes": 2})
    server.publish(name, convert(model.state_dict(), "published"), tmp_path)
    words = f"--model {name} --data {images}/test --classes {images}/train --out {tmp_path / 'run'} --workers 0"
    assert call("evaluate", *words.split(), "--device", "cpu") == 0
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert row["images"] == 12 and row["classes"] == 2
