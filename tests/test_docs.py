"""The Python examples of docs/quantizer.md and docs/weights.md run as they stand; defaults on pages are true."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from beitv2_fast import Classifier, FusedVectorQuantizer, Student, Tokenizer
from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.config.training import TrainConfig
from beitv2_fast.weights import convert
from beitv2_fast.weights import create as models
from beitv2_fast.weights.files import write

from .support.training import write_images

DOCS = Path(__file__).resolve().parents[1] / "docs"
SMALL = dict(dim=32, depth=3, heads=4)


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PAGE, WEIGHTS = DOCS / "quantizer.md", DOCS / "weights.md"
EXAMPLES, WEIGHTS_EXAMPLES = examples(PAGE), examples(WEIGHTS)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_page_run(code):
    for package in re.findall(r"^from (vector_quantize_pytorch|diffusers) import", code, re.MULTILINE):
        pytest.importorskip(package)
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})


def test_the_table_of_options_has_every_option_with_its_default():
    table = PAGE.read_text(encoding="utf-8").split("## Options")[1].split("A mask leaves")[0]
    stated = {}
    for names, defaults in re.findall(r"^\| (`\w.*?) \| (.*?) \|", table, re.MULTILINE):
        values = defaults.replace("by metric", "None").replace("`", "").split(", ")
        stated |= dict(zip(re.findall(r"\w+", names), map(ast.literal_eval, values), strict=True))
    options = inspect.signature(FusedVectorQuantizer).parameters.values()
    assert stated == {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 7


def test_the_defaults_told_on_the_page_on_reliability_are_those_of_the_code():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    told = {
        name: int(value) for name, value in re.findall(r"^\| [^|]*`--([a-z-]+)`[^|]*\((\d+)\) \|", page, re.MULTILINE)
    }
    defaults = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(TrainConfig)}
    assert told == {name: defaults[name] for name in ("stop-after-bad", "hang-after")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that docs/weights.md names, of small models under the names of the base ones."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("beitv2_base", {"early_layer": 2}), ("beitv2_base_classifier", {}), ("vqkd_base_clip", {})):
            patch.setitem(models.MODELS, name, models.model_config(name, **SMALL, **more))
        for name, file, kind in (
            ("beitv2_base", "student.pth", Student),
            ("beitv2_base_classifier", "classifier.pth", Classifier),
            ("vqkd_base_clip", "tokenizer.pth", Tokenizer),
        ):
            model = kind(models.MODELS[name])
            write(folder / file, convert(model.state_dict(), "published"), "published")
        ours = folder / "tokenizer.safetensors"
        write(ours, convert(model.state_dict(), "beitv2_fast"), "beitv2_fast", model.config)
        write_images(folder / "images", 3)
        (folder / "images" / "00.png").rename(folder / "photo.jpg")
        for out in ("codes.npz", "codes.safetensors"):
            encode_folder(folder / "images", EncodeConfig(ours, folder / out, device="cpu", workers=0))
        yield folder


@pytest.mark.parametrize("code", WEIGHTS_EXAMPLES, ids=range(len(WEIGHTS_EXAMPLES)))
def test_the_examples_of_the_page_on_weights_run(files, monkeypatch, code):
    written_before = ["transformers"] if "classifier_hf" in code else []
    for package in re.findall(r"^(?:from|import) (timm|transformers)", code, re.MULTILINE) + written_before:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if "import timm" in code:
        import timm

        small = functools.partial(timm.create_model, embed_dim=32, depth=3, num_heads=4)
        monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(files)
    exec(compile(code, str(WEIGHTS), "exec"), {"__name__": "example"})


def test_the_page_on_weights_has_an_example_for_each_way_in():
    assert len(WEIGHTS_EXAMPLES) >= 9
