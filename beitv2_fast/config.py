"""Configs are dataclasses; the command line is derived from them, a preset is a value of one."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

C = TypeVar("C", bound="RunConfig")


def option(default: Any, help: str, *, free: bool = False, choices: Sequence[str] | None = None) -> Any:
    """A config value with its help text. ``free``: it does not change the result and may differ when a run resumes."""
    return field(default=default, metadata={"help": help, "free": free, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """What every command with a run folder has."""

    out: Path = option(Path("runs/run"), "run folder: config, log, metrics, checkpoints; run again to resume")
    seed: int = option(0, "everything random follows from it")
    device: str = option("auto", "auto (CUDA or ROCm if there, else cpu), cpu, cuda", free=True)
    precision: str = option(
        "auto",
        "auto: bf16 autocast on GPUs and on CPUs with AMX, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    workers: int = option(2, "data-loading processes of each rank; 0 loads in the training process", free=True)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What every training has: data, ViT, optimiser, schedule, checkpoints."""

    data: Path = option(Path("data"), "folder of images; FOLDER/train is used if it exists, class folders are optional")
    image_size: int = option(224, "side of the square images that the model reads, in pixels")
    patch_size: int = option(16, "side of a patch, in pixels")
    dim: int = option(768, "width of the transformer")
    depth: int = option(12, "its blocks")
    heads: int = option(12, "its attention heads")
    drop_path: float = option(0.0, "stochastic depth: rate of the last block, linear from 0 at the first")
    epochs: int = option(100, "passes over the data")
    batch_size: int = option(64, "images a step on each rank")
    lr: float = option(1e-3, "peak learning rate for lr_batch images a step; scaled linearly to the real batch")
    lr_batch: int = option(2048, "batch that lr is meant for")
    min_lr: float = option(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: float = option(10, "epochs of linear warm-up from 0")
    weight_decay: float = option(0.05, "of AdamW; biases, norms, layer scales, tokens and positions are spared")
    betas: tuple[float, float] = option((0.9, 0.999), "of AdamW")
    clip_grad: float = option(3.0, "largest norm of the gradient; 0 switches clipping off")
    log_every: int = option(20, "steps between lines of the log; also the window of the usage statistics")
    save_every: int = option(200, "steps between checkpoints", free=True)
    keep_checkpoints: int = option(2, "how many checkpoints stay", free=True)
    deepspeed_config: Path | None = option(
        None, "DeepSpeed JSON (ZeRO stage, offload, ...); given or started by `deepspeed`: DeepSpeed trains", free=True
    )


@dataclass(frozen=True)
class TokenizerConfig(TrainConfig):
    """VQ-KD tokenizer training (arXiv 2208.06366 section 2.2)."""

    out: Path = option(Path("runs/tokenizer"), "run folder: config, log, metrics, checkpoints; run again to resume")
    teacher: str = option("clip", "whose features are to be predicted", choices=("clip", "dino", "efficientnet_lite0"))
    teacher_weights: str | None = option(None, "file with the teacher's weights; default: its package's own source")
    teacher_image_size: int | None = option(
        None, "side of the crop that the teacher reads, in pixels; default: image_size", free=False
    )
    num_codes: int = option(8192, "size of the codebook")
    code_dim: int = option(32, "width of a code")
    decoder_depth: int = option(3, "blocks of the decoder")
    decay: float = option(0.99, "of the codebook's EMA")
    commitment_weight: float = option(1.0, "beta, the weight of the commitment loss")
    kmeans_init: bool = option(True, "initialise the codebook by k-means on the first batch")
    dead_after: float = option(
        200.0, "a code idle for this many times its fair share of vectors restarts; 0: never, as the reference"
    )
    crop_scale: tuple[float, float] = option((0.08, 1.0), "area of the random crop, as a share of the image")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Masked image modelling with patch aggregation (arXiv 2208.06366 sections 2.3 and 2.4)."""

    out: Path = option(Path("runs/pretrain"), "run folder: config, log, metrics, checkpoints; run again to resume")
    tokenizer: Path = option(Path("runs/tokenizer"), "run folder of the tokenizer")
    layer_scale: float = option(0.1, "initial layer scale; 0: none")
    early_layer: int = option(9, "l: the aggregation branch reads the patches of this layer")
    aggregation_depth: int = option(2, "blocks of the aggregation branch; 0: none (BEiT v1's objective)")
    shared_head: bool = option(True, "both branches share the final norm and the head")
    num_masked: int = option(75, "masked patches of each image")
    min_mask_patches: int = option(16, "smallest block of the block mask")
    mask: str = option("block", "shape of the mask", choices=("block", "random"))
    crop_scale: tuple[float, float] = option((0.2, 1.0), "area of the random crop, as a share of the image")
    color_jitter: float = option(0.4, "brightness, contrast and saturation jitter of the student's view")


@dataclass(frozen=True)
class ProbeConfig(RunConfig):
    """Linear probe of a frozen backbone."""

    out: Path = option(Path("runs/probe"), "run folder: results.json and log")
    data: Path = option(Path("data"), "FOLDER/train/CLASS and FOLDER/test/CLASS (or val) with images")
    run: Path = option(Path("runs/pretrain"), "run folder of the pre-training whose backbone is probed")
    tokenizer: Path | None = option(None, "run folder of a tokenizer: also probe its teacher's features")
    features: str = option(
        "auto",
        "cls: the aggregation branch's CLS token; mean: mean patch token; auto: both",
        choices=("auto", "cls", "mean"),
    )
    seeds: int = option(3, "repetitions: each splits train into fit and validation anew")
    batch_size: int = option(64, "images a forward", free=True)


@dataclass(frozen=True)
class ReportConfig(RunConfig):
    """The report: one HTML file and its pictures, from the run folders of the other commands."""

    out: Path = option(Path("runs/report"), "folder of the report: report.html and PNG files; replaced if there is one")
    data: Path = option(Path("data"), "the image folder; examples come from FOLDER/test or FOLDER/val, if there is one")
    tokenizer: Path = option(Path("runs/tokenizer"), "run folder of the tokenizer")
    pretrain: Path = option(Path("runs/pretrain"), "run folder of the pre-training")
    probe: Path = option(Path("runs/probe"), "run folder of the linear probe")
    max_images: int = option(5000, "images of train, and of test or val, that are encoded; more: a sample")
    examples: int = option(6, "photographs shown with their token map; up to 4 with their mask")
    code_rows: int = option(24, "codes on the sheet of patches: half the most frequent, half a spread of the others")
    scale: float = option(2.0, "pixels of the pictures for each pixel of the page; 2: sharp on dense screens")
    batch_size: int = option(64, "images a forward", free=True)


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The values that determine a run's result, as JSON types."""
    return {
        f.name: _plain(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if not f.metadata["free"] and f.name != "out"
    }


def to_json(config: RunConfig) -> dict[str, Any]:
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
    """The config that ``to_json`` wrote. Unknown names are an error: the run was made by another version."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = values.keys() - fields.keys()
    if unknown:
        raise UserError(f"unknown config values {', '.join(sorted(unknown))}: made by another version of beitv2_fast?")
    types_ = typing.get_type_hints(cls)
    return cls(**{name: _restore(types_[name], value) for name, value in values.items()})


def parse(cls: type[C], presets: Mapping[str, C], argv: Sequence[str] | None = None) -> tuple[C, int | None]:
    """Read the command line: a preset, then single options over it.

    Returns:
        (config, local_rank); local_rank is what the `deepspeed` launcher passes, None without it.
    """
    description = f"{(cls.__doc__ or '').strip()} Options not given come from the preset."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = ", ".join(presets)
    parser.add_argument("--preset", choices=list(presets), help=f"start from these values: {names}", default="base")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS, default=None)
    types_ = typing.get_type_hints(cls)
    base = presets["base"]
    for f in dataclasses.fields(cls):
        kind, flag = types_[f.name], "--" + f.name.replace("_", "-")
        shown = f"{f.metadata['help']} (base: {_show(getattr(base, f.name))})"
        common: dict[str, Any] = {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is tuple:
            item, count = typing.get_args(kind)[0], len(typing.get_args(kind))
            parser.add_argument(flag, type=item, nargs=count, metavar=item.__name__.upper(), **common)
        else:
            item = _optional(kind)
            parser.add_argument(flag, type=item, choices=f.metadata["choices"], metavar=_metavar(f, item), **common)
    given = vars(parser.parse_args(argv))
    preset, local_rank = presets[given.pop("preset")], given.pop("local_rank")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return dataclasses.replace(preset, **given), local_rank


def _metavar(f: dataclasses.Field, item: type) -> str:
    return "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else item.__name__.upper()


def _optional(kind: Any) -> type:
    """X of Optional[X]; X itself otherwise."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _restore(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    return tuple(value) if typing.get_origin(kind) is tuple else _optional(kind)(value)
