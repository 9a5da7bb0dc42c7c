"""What ``import beitv2_fast`` brings along: torch, and nothing of the extras."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import beitv2_fast.data
from beitv2_fast.errors import UserError

EXTRAS = (
    "torchvision", "PIL", "numpy", "safetensors", "tqdm", "tensorboard", "deepspeed", "nvidia", "timm", "transformers",
    "open_clip", "xformers", "torchmetrics", "matplotlib", "faiss",
)  # fmt: skip
STEP = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})  # None: importing it raises ImportError
import torch
import beitv2_fast
for name in set(beitv2_fast.__all__) - {{"read_images"}}:  # which is of Pillow
    getattr(beitv2_fast, name)
quantizer = beitv2_fast.FusedVectorQuantizer(num_codes=16, dim=8)
quantizer(torch.randn(4, 9, 8, requires_grad=True)).loss.backward()
"""
LIGHT = """
import sys, torch
before = set(sys.modules)
import beitv2_fast
print(*{name.partition(".")[0] for name in sys.modules.keys() - before} - {"torch"})
print([name for name in sys.modules if name.startswith(("torch._dynamo", "beitv2_fast.weights", "beitv2_fast.data"))])
"""
LOAD = """
import sys, torch, beitv2_fast
print(torch.export.load(sys.argv[1]).module()(torch.ones(2, 8)).indices.tolist())
"""


def _run(code: str, *words: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quantizer_trains_where_only_torch_is_installed():
    _run(STEP)


def test_the_import_loads_neither_other_packages_nor_the_compiler_nor_what_nobody_asked_for():
    """torch._dynamo takes as long to import as everything else."""
    assert _run(LIGHT) == "beitv2_fast\n[]\n"


@pytest.mark.parametrize("package", ["numpy", "PIL"])
def test_where_only_torch_is_installed_images_say_which_extra_reads_them(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}(.|\n)*pip install 'beitv2-fast\[train\]'"):
        importlib.reload(beitv2_fast.data)


def test_type_checkers_and_dir_see_every_public_name():
    nodes = ast.walk(ast.parse(Path(beitv2_fast.__file__).read_text(encoding="utf-8")))
    nodes = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    seen = {alias.name: f"beitv2_fast.{node.module}" for node in nodes for alias in node.names}
    assert set(seen) == set(beitv2_fast.__all__) <= set(dir(beitv2_fast))
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(beitv2_fast, name)
    with pytest.raises(AttributeError, match="'beitv2_fast' has no attribute 'Quantizer'"):
        beitv2_fast.Quantizer  # noqa: B018


def test_an_exported_program_loads_where_the_package_was_only_imported(tmp_path):
    file, z = tmp_path / "quantizer.pt2", torch.ones(2, 8)
    quantizer = beitv2_fast.FusedVectorQuantizer(16, 8).eval()
    torch.export.save(torch.export.export(quantizer, (z,)), file)
    with zipfile.ZipFile(file) as archive:  # as in programs of earlier versions, whatever moved since
        assert any(b"beitv2_fast.quantized.Quantized" in archive.read(name) for name in archive.namelist())
    assert _run(LOAD, file) == f"{quantizer(z).indices.tolist()}\n"


def test_what_was_imported_from_convert_still_is():
    from beitv2_fast.convert import convert
    from beitv2_fast.convert.files import convert_file, read
    from beitv2_fast.convert.finetune import start_classifier

    assert convert is beitv2_fast.weights.convert is beitv2_fast.convert.convert
    assert (convert_file, read) == (beitv2_fast.cli.convert.convert_file, beitv2_fast.weights.files.read)
    assert start_classifier is beitv2_fast.weights.start.start_classifier
