"""Finds the compiled CPU ops. They are optional: without them the references run, and that is said once."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
OPS = (
    "attention",
    "attention_backward",
    "block_masks",
    "codebook_search",
    "codebook_statistics",
    "move_codebook",
    "softmax_cross_entropy_",
    "vector_quantize_backward",
)


@functools.cache
def native_ops() -> bool:
    """Whether the C++ ops ``torch.ops.beitv2_fast_cpu`` could be loaded; the first failure is a warning."""
    libraries = sorted(path for pattern in ("_cpu*.so", "_cpu*.pyd") for path in FOLDER.glob(pattern))
    if not libraries:
        warnings.warn(
            "beitv2_fast: the C++ ops were not compiled at installation, so on the CPU the plain PyTorch references "
            "run: same results, 10 to 100 times slower. Install a C++20 compiler (g++ >= 11), then "
            "`pip install --no-build-isolation --force-reinstall --no-deps` this package.",
            stacklevel=2,
        )
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        warnings.warn(
            f"beitv2_fast: the C++ ops do not load ({error}); they were compiled for another torch than "
            f"{torch.__version__}. The slower PyTorch references run. Reinstall with `pip install "
            "--no-build-isolation --force-reinstall --no-deps`.",
            stacklevel=2,
        )
        return False
    missing = [name for name in OPS if not hasattr(torch.ops.beitv2_fast_cpu, name)]
    if missing:
        warnings.warn(
            f"beitv2_fast: the C++ ops were compiled from older sources, without {', '.join(missing)}. The slower "
            "PyTorch references run. Reinstall with `pip install --no-build-isolation --force-reinstall --no-deps`.",
            stacklevel=2,
        )
    return not missing
