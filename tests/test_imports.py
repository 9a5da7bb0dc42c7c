"""What ``import beitv2_fast`` brings along: torch, and nothing of the extras."""

from __future__ import annotations

import subprocess
import sys

EXTRAS = (
    "torchvision", "PIL", "numpy", "safetensors", "tqdm", "tensorboard", "deepspeed", "nvidia", "timm", "transformers",
    "open_clip", "xformers", "torchmetrics", "matplotlib", "faiss",
)  # fmt: skip
STEP = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})  # None: importing it raises ImportError
import torch
import beitv2_fast
for name in beitv2_fast.__all__:
    getattr(beitv2_fast, name)
quantizer = beitv2_fast.FusedVectorQuantizer(num_codes=16, dim=8)
quantizer(torch.randn(4, 9, 8, requires_grad=True)).loss.backward()
"""


def _run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_quantizer_trains_where_torch_alone_is_installed():
    assert (done := _run(STEP)).returncode == 0, done.stderr


def test_the_import_leaves_the_compiler_out():
    """torch._dynamo takes as long to import as everything else."""
    done = _run("import sys, beitv2_fast; assert 'torch._dynamo' not in sys.modules")
    assert done.returncode == 0, done.stderr
