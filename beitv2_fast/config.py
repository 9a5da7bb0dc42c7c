"""Configs are dataclasses; the command line is derived from them, a preset is a value of one."""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .attention import IMPLEMENTATIONS
from .errors import UserError
from .options import DEAD_AFTER

C = TypeVar("C", bound="RunConfig")


OUT = "run folder for config, log, metrics and checkpoints; the same command run again resumes it"
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def option(
    default: Any,
    help: str,
    *,
    free: bool = False,
    holds: str = "",
    choices: Sequence[str] | None = None,
    **limits: float,
) -> Any:
    """A config value with its help text.

    ``free``: it does not change the result and may differ when a run resumes. ``holds``: it is a path, and not the path
    but what is there has to stay: "images"; "weights" that every step needs; "start": weights that are read once.
    ``limits``: some of ``LIMITS``.
    """
    metadata = {"help": help, "free": free, "holds": holds, "choices": choices, "limits": limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """What every command with a run folder has."""

    out: Path = option(Path("runs/run"), OUT)
    seed: int = option(0, "everything random follows from it: the same seed gives the same run", at_least=0)
    device: str = option(
        "auto", "what computes; auto: a CUDA or ROCm GPU if there is one, else the CPU", free=True,
        choices=("auto", "cpu", "cuda"),
    )  # fmt: skip
    workers: int = option(
        2, "data-loading processes of each rank; 0: the training process loads", free=True, at_least=0
    )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What every training has: data, ViT, optimiser, schedule, checkpoints."""

    data: Path = option(
        Path("data"),
        "folder of images (FOLDER/train is used if it exists, class folders are optional) or of tar shards, or a "
        "pattern such as 'shards/train-{0000..0146}.tar'",
        holds="images",
    )
    loader: str = option(
        "auto",
        "what decodes the images: dali, on the GPU where there is one; torchvision, with PIL, on the CPU; auto: dali "
        "if it is installed. On the CPU both give the same bits, a GPU's decoder does not",
        choices=("auto", "dali", "torchvision"),
    )
    in_memory: bool = option(
        False,
        "decode all images once and keep them in memory, which the workers share; torchvision's loader",
        free=True,
    )
    precision: str = option(
        "auto",
        "arithmetic of the networks; bf16: autocast, fp32 weights; auto: bf16 on GPUs and CPUs with AMX, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    image_size: int = option(224, "side of the square images that the model reads, in pixels", at_least=1)
    patch_size: int = option(16, "side of a patch, in pixels; image_size must be a multiple of it", at_least=1)
    dim: int = option(768, "width of the vision transformer; a multiple of heads", at_least=1)
    depth: int = option(12, "number of transformer blocks", at_least=1)
    heads: int = option(12, "attention heads of each block", at_least=1)
    init_std: float = option(
        0.02, "standard deviation of the initial weights; narrow models (dim 128, say) start to learn sooner with 0.1",
        above=0,
    )  # fmt: skip
    drop_path: float = option(
        0.0, "stochastic depth: how often the last block is skipped, falling linearly to 0 at the first", at_least=0,
        below=1,
    )  # fmt: skip
    attention: str = option(
        "auto",
        "what computes attention; auto: native (C++) on CPUs, xformers on GPUs that it supports, else PyTorch's sdpa",
        choices=IMPLEMENTATIONS,
    )  # fmt: skip
    checkpointing: bool = option(
        False, "keep only the input of each transformer block and compute the rest again for the gradient: the same "
        "result in less memory and a third more time", free=True,
    )  # fmt: skip
    compile: bool = option(False, "torch.compile the model: minutes at the start, faster steps on GPUs")
    epochs: int = option(100, "passes over the images", at_least=1)
    batch_size: int = option(
        64, "images a forward on each rank (process); a step has batch_size x accumulate x ranks images, a product "
        "that must stay when a run resumes", free=True, at_least=1,
    )  # fmt: skip
    accumulate: int = option(
        1, "forwards whose gradients make one step: more images a step than fit in memory", free=True, at_least=1
    )
    lr: float = option(
        1e-3, "peak learning rate if a step has lr_batch images; scaled in proportion to the images it really has",
        above=0,
    )  # fmt: skip
    lr_batch: int = option(2048, "the batch of all ranks that lr is meant for", at_least=1)
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", at_least=0)
    warmup_epochs: float = option(10, "epochs in which the learning rate rises linearly from 0", at_least=0)
    weight_decay: float = option(
        0.05,
        "AdamW's weight decay; biases, norms, layer scales, CLS tokens and position embeddings are spared",
        at_least=0,
    )
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's decay rates of its two averages", at_least=0, below=1)
    clip_grad: float = option(3.0, "gradients longer than this are scaled down to it; 0: never", at_least=0)
    log_every: int = option(
        20, "steps between lines of the log, which are means over these steps; codebook usage counts over them too",
        at_least=1,
    )  # fmt: skip
    save_every: int = option(200, "steps between checkpoints", free=True, at_least=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", free=True, at_least=1)
    stop_after_bad: int = option(
        10, "a step whose loss or gradient is NaN or Inf is skipped; after this many in a row the run ends, its last "
        "checkpoint kept and the batch written", free=True, at_least=1,
    )  # fmt: skip
    hang_after: float = option(
        1800.0, "seconds without a step after which every rank writes where it stands and ends; 0: never", free=True,
        at_least=0,
    )  # fmt: skip
    deepspeed_config: Path | None = option(
        None,
        "DeepSpeed JSON file (ZeRO stage, offload; see train/configs); with it, or started by `deepspeed`, DeepSpeed "
        "trains",
        free=True,
    )


@dataclass(frozen=True)
class TokenizerConfig(TrainConfig):
    """VQ-KD tokenizer training (arXiv 2208.06366 section 2.2)."""

    out: Path = option(Path("runs/tokenizer"), OUT)
    teacher: str = option(
        "clip", "frozen network whose features the tokenizer learns to predict: clip, dino, timm:NAME or "
        "timm:NAME@LAYER (any timm model), efficientnet_lite0",
    )  # fmt: skip
    teacher_weights: str | None = option(
        None, "the teacher's weights: a file, or a hub name (hf-hub:ORGANISATION/NAME, or a tag of open_clip); none: "
        "the source of the package that brings the teacher", holds="weights",
    )  # fmt: skip
    teacher_image_size: int | None = option(
        None, "side of the crop that the teacher reads, in pixels; none: image_size", at_least=1
    )
    views: int = option(
        0, "0: a new random view of every image in each epoch; V: only V views of it, whose teacher features are "
        "computed once and kept", at_least=0,
    )  # fmt: skip
    teacher_cache: Path | None = option(
        None, "folder of the teacher's features with --views, which other runs may share, also at the same time; none: "
        "in the run folder", free=True,
    )  # fmt: skip
    num_codes: int = option(8192, "size of the codebook, the number of visual tokens", at_least=1)
    code_dim: int = option(32, "width of a code, the vectors that are compared", at_least=1)
    decoder_depth: int = option(3, "transformer blocks of the decoder", at_least=1)
    decay: float = option(0.99, "how much of a code stays in each step of its moving average", at_least=0, at_most=1)
    commitment_weight: float = option(1.0, "weight of the commitment loss (the paper's beta)", at_least=0)
    kmeans_init: bool = option(True, "initialise the codebook by k-means on the first batch")
    dead_after: float = option(
        DEAD_AFTER, "a code idle for this many times its fair share of vectors restarts; 0: never, as the reference",
        at_least=0,
    )  # fmt: skip
    collapse_below: float = option(
        0.05, "warn of codebook collapse if less than this share of the codes is used in a line of the log ...",
        free=True, at_least=0, at_most=1,
    )  # fmt: skip
    collapse_after: int = option(1000, "... for this many steps", free=True, at_least=1)
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "least and largest area of the random crop, as a share of the image", above=0, at_most=1
    )


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Masked image modelling with patch aggregation (arXiv 2208.06366 sections 2.3 and 2.4)."""

    out: Path = option(Path("runs/pretrain"), OUT)
    tokenizer: Path = option(Path("runs/tokenizer"), "run folder of the trained tokenizer", holds="weights")
    tokenizer_image_size: int | None = option(
        None, "side of the images that the tokenizer reads, its positions interpolated; none: that of its training",
        at_least=1,
    )  # fmt: skip
    position: str = option(
        "shared_relative",
        "positions of the student; shared_relative: one table of biases for all blocks; relative: a table for each "
        "block; absolute: position embeddings",
        choices=("shared_relative", "relative", "absolute"),
    )
    layer_scale: float = option(0.1, "initial scale of every residual branch; 0: no layer scale", at_least=0)
    early_layer: int = option(
        9, "the aggregation branch reads the patches after this block (the paper's l)", at_least=1
    )
    aggregation_depth: int = option(
        2, "transformer blocks of the aggregation branch; 0: no such branch (BEiT v1's objective)", at_least=0
    )
    shared_head: bool = option(True, "both branches share the final norm and the head")
    loss_on: str = option(
        "both", "the branches whose loss is learnt from, an ablation; last: the last layer's alone, aggregation: the "
        "aggregation branch's alone; without such a branch there is only the last layer's",
        choices=("both", "last", "aggregation"),
    )  # fmt: skip
    num_masked: int = option(75, "masked patches of each image", at_least=1)
    min_mask_patches: int = option(16, "patches of the smallest block of the block mask", at_least=1)
    mask: str = option("block", "shape of the mask; random: single patches, an ablation", choices=("block", "random"))
    masks: str = option(
        "loader", "what draws the masks: the loader's processes, or the device that trains, for the whole batch at "
        "once; the same masks", free=True, choices=("loader", "device"),
    )  # fmt: skip
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "least and largest area of the random crop, as a share of the image", above=0, at_most=1
    )
    color_jitter: float = option(
        0.4, "brightness, contrast and saturation of the student's view change by up to this share", at_least=0
    )


@dataclass(frozen=True)
class ReportConfig(RunConfig):
    """The report: one HTML file and its pictures, from the run folders of the other commands."""

    out: Path = option(Path("runs/report"), "folder of the report: report.html and PNG files; replaced if there is one")
    data: Path = option(Path("data"), "the image folder; examples come from FOLDER/test or FOLDER/val, if there is one")
    tokenizer: Path = option(Path("runs/tokenizer"), "run folder of the tokenizer")
    pretrain: Path = option(Path("runs/pretrain"), "run folder of the pre-training")
    probe: Path = option(Path("runs/probe"), "run folder of the linear probe")
    downstream: tuple[Path, ...] = option(
        (), "run folders of fine-tunings, segmentations and evaluations, to be reported too"
    )
    compare: tuple[Path, ...] = option((), "run folders of any trainings, whose curves are drawn beside each other")
    teacher: bool = option(True, "load the tokenizer's teacher, to show what the codes keep of it", free=True)
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
        raise UserError(
            f"a run's config has values that a {cls.__name__} does not know: {', '.join(sorted(unknown))}. "
            "Name the run folder of another stage, or one made by this version."
        )
    types_ = typing.get_type_hints(cls)
    return cls(**{name: _restore(types_[name], value) for name, value in values.items()})


def parse(cls: type[C], presets: Mapping[str, C], argv: Sequence[str] | None = None) -> tuple[C, int | None]:
    """Read the command line: a preset, then single options over it.

    Returns:
        (config, local_rank); local_rank is what the `deepspeed` launcher passes, None without it.
    """
    name = _preset(presets, argv)
    title = (cls.__doc__ or "").strip()
    parser = argparse.ArgumentParser(description=f"{title} Values in brackets: those of the preset {name}.")
    shown = "the values of options that are not given; before --help, the values it shows"
    parser.add_argument("--preset", choices=list(presets), default="base", help=f"{shown} [{name}]")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS, default=None)
    add_options(parser, presets[name])
    given = vars(parser.parse_args(argv))
    preset, local_rank = presets[given.pop("preset")], given.pop("local_rank")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    config = dataclasses.replace(preset, **given)
    check_limits(config)
    return config, local_rank


def add_options(parser: argparse.ArgumentParser, shown: Any) -> None:
    """An option for every field of a dataclass of ``option``s; --help shows the values of this one."""
    types_ = typing.get_type_hints(type(shown))
    for f in dataclasses.fields(shown):
        kind, flag = types_[f.name], "--" + f.name.replace("_", "-")
        text = f"{f.metadata['help']} [{_show(getattr(shown, f.name))}]"
        common: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is tuple:
            item, count = typing.get_args(kind)[0], len(typing.get_args(kind))
            count = "+" if typing.get_args(kind)[-1] is Ellipsis else count
            parser.add_argument(flag, type=_typed(item), nargs=count, metavar=item.__name__.upper(), **common)
        else:
            item = _optional(kind)
            parser.add_argument(
                flag, type=_typed(item), choices=f.metadata["choices"], metavar=_metavar(f, item), **common
            )


def path(text: str) -> Path:
    """A path as it is typed: shells leave the ``~`` of ``--out=~/x``, and one within quotes, as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error} Write ./{text} for a name that begins so.") from error


def check_limits(config: Any) -> None:
    """UserError if a number is not finite or outside the limits of its option, or a range runs backwards."""
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)]
        limits = f.metadata["limits"]
        inside = all(LIMITS[name](v, limit) for v in numbers for name, limit in limits.items())
        if not (inside and all(map(math.isfinite, numbers))):
            wanted = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
            raise UserError(f"{flag} is {_show(value)}, but must be {wanted or 'a finite number'}.")
        if f.name in ("crop_scale", "scale_range") and value[0] > value[1]:
            raise UserError(f"{flag} is {_show(value)}, but its first number must not be above its second.")


def _preset(presets: Mapping[str, C], argv: Sequence[str] | None) -> str:
    """The preset on the command line, whose values --help shows."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="base")
    name = first.parse_known_args(argv)[0].preset
    return name if name in presets else "base"


def _metavar(f: dataclasses.Field, item: type) -> str:
    return "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else item.__name__.upper()


def _typed(item: type) -> Callable[[str], Any]:
    return path if item is Path else item


def _optional(kind: Any) -> type:
    """X of Optional[X]; X itself otherwise."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _restore(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(map(typing.get_args(kind)[0], value))
    return _optional(kind)(value)
