"""The pages: Python examples run as they stand, commands are understood, defaults are true, what is named exists."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import beitv2_fast
from beitv2_fast import Classifier, FusedVectorQuantizer, Student, Tokenizer, kernels
from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.cli.picture_options import PICTURES
from beitv2_fast.config.options import RunConfig
from beitv2_fast.config.show import ExploreConfig
from beitv2_fast.config.training import TrainConfig
from beitv2_fast.train.experiments.ablate import AblateConfig
from beitv2_fast.train.experiments.downstream import DownstreamConfig
from beitv2_fast.weights import convert
from beitv2_fast.weights import create as models
from beitv2_fast.weights.files import write

from .support.training import write_images

ROOT = Path(__file__).resolve().parents[1]
DOCS, TESTS = ROOT / "docs", ROOT / "tests"
FOLDERS = (".", "docs", "docs/api", "docs/demo", "bench", "kernels")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
FILE = re.compile(r"(?<![\w/{.*-])(?:[\w-]+/)+[\w-]+\.(?:py|md|sh|json|png)\b")
MADE = ("docs/gpu.md", "runs/")  # by the commands of the pages
SMALL = dict(dim=32, depth=3, heads=4)


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


README, PAGE, WEIGHTS = ROOT / "README.md", DOCS / "quantizer.md", DOCS / "weights.md"
WEIGHTS_EXAMPLES = examples(WEIGHTS)
EXAMPLES = [code for page in PAGES if page != WEIGHTS for code in examples(page)]  # which need files


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_pages_run(code):
    for package in re.findall(r"^from (vector_quantize_pytorch|diffusers) import", code, re.MULTILINE):
        pytest.importorskip(package)
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_every_public_name_has_its_place_in_the_api_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = [path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)]
    assert sorted(shown) == sorted([*beitv2_fast.__all__, *kernels.__all__, "convert"])


@pytest.mark.parametrize("name", [*beitv2_fast.__all__, *kernels.__all__])
def test_every_argument_that_a_public_docstring_explains_has_a_line_of_its_own(name):
    public = getattr(beitv2_fast if name in beitv2_fast.__all__ else kernels, name)
    methods = [value for key, value in vars(public).items() if key[0] != "_"] if inspect.isclass(public) else []
    for function in filter(callable, [public, *methods]):
        explained = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
        for parameter in inspect.signature(function).parameters if explained else ():
            assert re.search(rf"[.;,] {parameter}: ", explained) is None, parameter


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 120


LAUNCHED = r"(?:deepspeed|torchrun|python)(?: --?[\w-]+ \w+)*? "
COMMAND = re.compile(LAUNCHED + r"(?:-m )?(beitv2_fast\.train\.[\w.]+|train/\w+\.py) ?(.*)")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command of ours that a page shows in a block of its own."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for line in re.findall(r"^    (?:\$ )?(.*)", text, re.MULTILINE):
        if line.startswith("beitv2-fast "):
            found.append(("beitv2_fast.cli", line.removeprefix("beitv2-fast ")))
        elif command := COMMAND.match(line):
            module = command[1].removesuffix(".py").replace("/", ".").removeprefix("beitv2_fast.")
            found.append((f"beitv2_fast.{module}", command[2]))
    return [(module, shlex.split(arguments, comments=True)) for module, arguments in found]


COMMANDS = [(page.name, *command) for page in PAGES for command in commands(page)]


class UnderstoodError(Exception):
    """Instead of what the command would do."""


@pytest.mark.parametrize(("page", "module", "arguments"), COMMANDS, ids=[f"{c[0]}-{c[1]}" for c in COMMANDS])
def test_the_commands_of_the_pages_are_understood(monkeypatch, page, module, arguments):
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(UnderstoodError):
        getattr(importlib.import_module(module), "run_command" if module == "beitv2_fast.cli" else "main")()


def test_most_commands_are_found_on_the_pages():
    assert len(COMMANDS) > 30 and {"README.md", "training.md", "weights.md"} <= {page for page, *_ in COMMANDS}


def options_of_all_commands() -> set[str]:
    configs = [RunConfig, AblateConfig, DownstreamConfig]
    for config in configs:  # which grows
        configs += config.__subclasses__()
    configs += [ExploreConfig, EncodeConfig, *map(type, PICTURES.values())]
    return {field.name.replace("_", "-") for config in configs for field in dataclasses.fields(config)}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_the_options_that_a_page_names_exist(page):
    known = options_of_all_commands() | {"help", "version", "preset", "from", "build-isolation"}
    named = re.findall(r"`--(?:no-)?([a-z][a-z-]+)", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_the_extras_and_make_targets_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    extras = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([\w$()./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for names in re.findall(r"(?:beitv2-fast|['\"]\.)\[([a-z,]+)\]", text) for name in names.split(",")}
    assert named - extras == set()
    assert set(re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE)) - targets == set()


def test_the_table_of_options_has_every_option_with_its_default():
    table = PAGE.read_text(encoding="utf-8").split("## Options")[1].split("A mask leaves")[0]
    stated = {}
    for names, defaults in re.findall(r"^\| (`\w.*?) \| (.*?) \|", table, re.MULTILINE):
        values = defaults.replace("by metric", "None").replace("`", "").split(", ")
        stated |= dict(zip(re.findall(r"\w+", names), map(ast.literal_eval, values), strict=True))
    options = inspect.signature(FusedVectorQuantizer).parameters.values()
    assert stated == {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}


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


def anchors(page: Path) -> set[str]:
    """Of its headings, as hosts of repositories and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_the_links_of_a_page_lead_somewhere_and_those_of_the_site_stay_in_it(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / link).resolve() for link in links]
    assert [target for target in targets if not target.exists()] == []
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors((page.parent / link) if link else page), f"{link}#{anchor}"
    if page.is_relative_to(DOCS):  # which mkdocs builds by themselves
        assert [target for target in targets if not target.is_relative_to(DOCS)] == []


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
