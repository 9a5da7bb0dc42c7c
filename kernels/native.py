"""Finds the compiled CPU ops. They are optional: without them the references run, and once it is said why."""

from __future__ import annotations

import functools
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
# The library is of one torch, and of any Python.
LIBRARY = "_cpu" + next(s for s in EXTENSION_SUFFIXES if s in (".abi3.so", ".pyd"))
OPS = (
    "attention",
    "attention_backward",
    "block_masks",
    "codebook_gradient",
    "codebook_search",
    "codebook_statistics",
    "draw_codes",
    "move_codebook",
    "nearest_codes",
    "softmax_cross_entropy_",
    "vector_quantize_backward",
)


COMPILED_FOR = "compiled for torch "  # how the text that setup.py writes beside the library begins, if there is one


@functools.cache
def native_ops() -> bool:
    """Whether the C++ ops ``torch.ops.beitv2_fast_cpu`` could be loaded; if not, one warning says why."""
    problem = _load()
    if problem:
        warnings.warn(
            f"beitv2_fast: the C++ ops {problem}. On the CPU the plain PyTorch references run: same results, 10 to 100 "
            "times slower. Install this package again beside its torch, with a C++20 compiler (g++ >= 11) on the PATH; "
            "in a clone: `pip install --no-build-isolation --force-reinstall --no-deps .`",
            stacklevel=2,
        )
    return not problem


def _load() -> str | None:
    """Loads the library of this torch, or tells what is wrong with it."""
    library = FOLDER / LIBRARY
    text = library.with_suffix(".txt")
    record = text.read_text(encoding="utf-8", errors="replace").strip() if text.exists() else ""
    if not library.exists():
        others = sorted(path.name for pattern in ("_cpu*.so", "_cpu*.pyd") for path in FOLDER.glob(pattern))
        if record and not record.startswith(COMPILED_FOR):
            return f"could not be compiled at installation ({record})"
        if others:
            return f"were compiled for one Python, as earlier versions did ({', '.join(others)})"
        return "are not here: this copy of the package was not installed by pip, or they were removed"
    if record.startswith(COMPILED_FOR):
        theirs = record.removeprefix(COMPILED_FOR)
        if theirs.split(".")[:2] != torch.__version__.split(".")[:2]:
            return f"were compiled for torch {theirs}, and this is torch {torch.__version__}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"do not load beside torch {torch.__version__} ({error})"
    missing = [name for name in OPS if not hasattr(torch.ops.beitv2_fast_cpu, name)]
    return f"were compiled from older sources, without {', '.join(missing)}" if missing else None
