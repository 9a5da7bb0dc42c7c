"""The pages: Python examples run as they stand, defaults are true, files, modules and tests that are named exist."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from beitv2_fast import Classifier, Student, Tokenizer
from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.config.training import TrainConfig
from beitv2_fast.quantize.options import QuantizerOptions
from beitv2_fast.weights import convert
from beitv2_fast.weights import create as models
from beitv2_fast.weights.files import write

from .support.training import write_images

ROOT = Path(__file__).resolve().parents[1]
DOCS, TESTS = ROOT / "docs", ROOT / "tests"
PAGES = [page for folder in (".", "docs", "bench", "kernels") for page in sorted((ROOT / folder).glob("*.md"))]
FILE = re.compile(r"(?<![\w/{.*-])(?:[\w-]+/)+[\w-]+\.(?:py|md|sh|json|png)\b")
MADE = ("docs/gpu.md", "runs/")  # by the commands of the pages
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
    assert stated == {field.name: field.default for field in dataclasses.fields(QuantizerOptions)}


def test_the_defaults_told_on_the_page_on_reliability_are_those_of_the_code():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    told = {
        name: int(value) for name, value in re.findall(r"^\| [^|]*`--([a-z-]+)`[^|]*\((\d+)\) \|", page, re.MULTILINE)
    }
    defaults = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(TrainConfig)}
    assert told == {name: defaults[name] for name in ("stop-after-bad", "hang-after")}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_the_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    files = {name for name in FILE.findall(text) if not name.startswith(MADE)}
    assert [f for f in files if not any((at / f).exists() for at in (ROOT, page.parent, TESTS, ROOT / "kernels"))] == []
    for name in re.findall(r"\bbeitv2_fast(?:\.[A-Za-z_]\w*)+(?![\w/])", text):
        pkgutil.resolve_name(name)
    for name in re.findall(r"\bbench\.\w+", text):
        assert importlib.util.find_spec(name), name


def named_on_the_page_on_reliability() -> list[tuple[str, str]]:
    """(file, test) in the order of the page; a name without a file belongs to the file before it."""
    found, file = [], ""
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    for given, test in re.findall(r"`([\w/]*\.py)?::(test_\w+)`", page):
        file = given or file
        found.append((file, test))
    return found


def test_every_test_that_the_page_on_reliability_names_exists():
    named = named_on_the_page_on_reliability()
    assert len(named) > 30
    texts = {file: "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob(file)) for file, _ in named}
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in texts[file]] == []


def test_every_test_of_faults_is_named_on_the_page_on_reliability():
    files = [TESTS / "training" / "test_faults.py", *(TESTS / "faults").glob("test_*.py")]
    tests = {test for file in files for test in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)}
    assert tests - {test for _, test in named_on_the_page_on_reliability()} == set()


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


def test_the_pages_have_examples():
    assert len(EXAMPLES) >= 7 and len(WEIGHTS_EXAMPLES) >= 9  # of weights, one for each way in
