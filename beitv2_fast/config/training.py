"""Configs are dataclasses; the command line is derived from them, a preset is a value of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..distributed import PRECISIONS
from ..models.attention import IMPLEMENTATIONS
from ..quantize.options import DEAD_AFTER
from .options import OUT, SOURCE, RunConfig, option

LOADERS = ("auto", "gpu", "dali", "torchvision")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What every training has: data, ViT, optimizer, schedule, checkpoints."""

    data: Path = option(
        Path("data"),
        "folder of images (FOLDER/train is used if it exists, class folders are optional), of tar shards, or of the "
        "Arrow or Parquet files of a Hugging Face data set; a pattern such as 'shards/train-{0000..0146}.tar'; or a "
        "text file in the folder that lists images and classes",
        holds="images",
        group="images",
    )
    loader: str = option(
        "auto",
        "what loads the images: gpu, which keeps them all decoded on the device that trains and makes whole batches "
        "there; dali, which decodes on the GPU where there is one; torchvision, with PIL, on the CPU; auto: gpu on a "
        "GPU if few and small images fit, else dali if it is installed. The same crops, flips, colors and masks; on "
        "the CPU dali and torchvision give the same bits, a GPU's decoder and gpu's resize differ by a level or so",
        choices=LOADERS,
    )
    in_memory: bool = option(
        False,
        "decode all images once and keep them in memory, which the workers share; torchvision's loader, where auto "
        "does not choose gpu, which keeps them itself",
        free=True,
    )
    precision: str = option(
        "auto",
        "arithmetic of the networks; bf16, fp16: autocast, fp32 weights; fp16 with dynamic loss scaling; auto: bf16 on "
        "GPUs that have it and CPUs that multiply it fast (AMX, AMD's AVX512_BF16), fp16 on older GPUs, else fp32",
        choices=("auto", *PRECISIONS),
        group="network",
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
        "what computes attention; auto: native (C++ on CPUs, Triton on GPUs of compute capability 9), on other GPUs "
        "xformers if it supports them, else PyTorch's sdpa",
        choices=IMPLEMENTATIONS,
    )  # fmt: skip
    checkpointing: bool = option(
        False, "keep only the input of each transformer block and compute the rest again for the gradient: the same "
        "result in less memory and a third more time", free=True,
    )  # fmt: skip
    compile: bool = option(False, "torch.compile the model: minutes at the start, faster steps on GPUs")
    epochs: int = option(100, "passes over the images", at_least=1, group="optimization")
    batch_size: int = option(
        64, "images per forward on each rank (process); a step has batch_size x accumulate x ranks images, a product "
        "that must stay when a run resumes", free=True, at_least=1,
    )  # fmt: skip
    accumulate: int = option(
        1, "forwards whose gradients make one step: more images per step than fit in memory", free=True, at_least=1
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
    weight_decay_end: float | None = option(
        None, "the weight decay goes to this one over the training, along a cosine; none: it stays", at_least=0
    )
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's decay rates of its two averages", at_least=0, below=1)
    clip_grad: float = option(3.0, "gradients longer than this are scaled down to it; 0: never", at_least=0)
    log_every: int = option(
        20, "steps between lines of the log, which are means over these steps; codebook usage counts over them too",
        at_least=1, group="log, checkpoints, faults",
    )  # fmt: skip
    save_every_minutes: float = option(
        15.0, "minutes between checkpoints; 0: only as other options say. The last step, and a signal, always save",
        free=True, at_least=0,
    )  # fmt: skip
    save_every_epochs: int = option(0, "epochs after which a checkpoint is saved, too; 0: none", free=True, at_least=0)
    save_every: int | None = option(
        None, "steps between checkpoints, instead of minutes and epochs; none: as these say", free=True, at_least=1
    )
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", free=True, at_least=1)
    keep_every: int = option(
        0, "epochs after which a checkpoint is saved that is kept for good, beside the newest; 0: none", free=True,
        at_least=0,
    )  # fmt: skip
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
class CapturedConfig(TrainConfig):
    """A training whose step draws nothing on the host."""

    cuda_graph: bool = option(
        False, "capture the step in a CUDA graph, which the host launches at once: for models so small that the host "
        "is slower than the GPU; one process, without --accumulate and --checkpointing", free=True,
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizerConfig(CapturedConfig):
    """VQ-KD tokenizer training (arXiv 2208.06366 section 2.2)."""

    stage: ClassVar[str] = "tokenizer"
    example: ClassVar[str] = "python train/tokenizer.py --preset demo --data PHOTOS --out runs/tokenizer"
    out: Path = option(Path("runs/tokenizer"), OUT)
    val: Path | None = option(
        None, "folder of images to evaluate on after every epoch: similarity to the teacher, unused codes; none: "
        "FOLDER/val of --data, if there is one", free=True, group="evaluation",
    )  # fmt: skip
    eval_every: int = option(1, "epochs between these; the last is always evaluated", free=True, at_least=1)
    teacher: str = option(
        "clip", "frozen network whose features the tokenizer learns to predict: clip, dino, efficientnet_lite0, "
        "open_clip:NAME@TAG (any of open_clip), timm:NAME (any timm model), transformers:NAME (a vision model of the "
        "hub, or its folder); with @LAYER one of the layers of efficientnet_lite0 or of timm:NAME", group="teacher",
    )  # fmt: skip
    teacher_weights: str | None = option(
        None, "the teacher's weights: a file, or a hub name (hf-hub:ORGANIZATION/NAME, or a tag of open_clip); none: "
        "the source of the package that brings the teacher", holds="weights",
    )  # fmt: skip
    teacher_image_size: int | None = option(
        None, "side of the crop that the teacher reads, in pixels; none: image_size", at_least=1
    )
    teacher_resize: bool = option(
        False, "let the teacher read images of its own size, and interpolate its features to the tokenizer's grid; "
        "otherwise it reads as many patches as the tokenizer has, its positions interpolated, or is refused"
    )  # fmt: skip
    views: int = option(
        0, "0: a new random view of every image in each epoch; V: only V views of it, whose teacher features are "
        "computed once and kept", at_least=0,
    )  # fmt: skip
    teacher_cache: Path | None = option(
        None, "folder of the teacher's features with --views, which other runs may share, also at the same time; none: "
        "in the run folder", free=True,
    )  # fmt: skip
    num_codes: int = option(8192, "size of the codebook, the number of visual tokens", at_least=1, group="codebook")
    code_dim: int = option(32, "width of a code, the vectors that are compared", at_least=1)
    decoder_depth: int = option(3, "transformer blocks of the decoder", at_least=1)
    decay: float = option(0.99, "how much of a code stays in each step of its moving average", at_least=0, at_most=1)
    commitment_weight: float = option(1.0, "weight of the commitment loss (the paper's beta)", at_least=0)
    kmeans_init: bool = option(True, "initialize the codebook by k-means on the first batch")
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
        (0.08, 1.0),
        "least and largest area of the random crop, as a share of the image",
        above=0,
        at_most=1,
        group="augmentation",
    )


@dataclass(frozen=True)
class PretrainConfig(CapturedConfig):
    """Masked image modeling with patch aggregation (arXiv 2208.06366 sections 2.3 and 2.4)."""

    stage: ClassVar[str] = "pretrain"
    example: ClassVar[str] = (
        "python train/pretrain.py --preset demo --data PHOTOS --tokenizer runs/tokenizer --out runs/pretrain"
    )
    out: Path = option(Path("runs/pretrain"), OUT)
    tokenizer: Path = option(
        Path("runs/tokenizer"), f"the trained tokenizer: {SOURCE}", holds="weights", group="tokenizer"
    )
    tokenizer_image_size: int | None = option(
        None, "side of the images that the tokenizer reads, its positions interpolated; none: that of its training",
        at_least=1,
    )  # fmt: skip
    position: str = option(
        "shared_relative",
        "positions of the student; shared_relative: one table of biases for all blocks; relative: a table for each "
        "block; absolute: position embeddings; absolute_...: these beside the tables",
        choices=("shared_relative", "relative", "absolute", "absolute_shared_relative", "absolute_relative"),
        group="student",
    )
    layer_scale: float = option(0.1, "initial scale of every residual branch; 0: no layer scale", at_least=0)
    early_layer: int = option(
        9,
        "the aggregation branch reads the patches after this block (the paper's l); with another --depth: the same "
        "share of it",
        at_least=1,
    )
    aggregation_depth: int = option(
        2, "transformer blocks of the aggregation branch; 0: no such branch (BEiT v1's objective)", at_least=0
    )
    shared_head: bool = option(True, "both branches share the final norm and the head")
    loss_on: str = option(
        "both", "the branches whose loss is learned from, an ablation; last: only the last layer's, aggregation: only "
        "the aggregation branch's; without such a branch there is only the last layer's",
        choices=("both", "last", "aggregation"),
    )  # fmt: skip
    num_masked: int = option(
        75,
        "masked patches of each image; with another --image-size or --patch-size: the same share of all",
        at_least=1,
        group="masks",
    )
    min_mask_patches: int = option(16, "patches of the smallest block of the block mask; likewise", at_least=1)
    max_mask_patches: int | None = option(
        None, "patches that a block may mask at most; none: all that are still wanted", at_least=1
    )
    mask: str = option("block", "shape of the mask; random: single patches, an ablation", choices=("block", "random"))
    masks: str = option(
        "loader", "what draws the masks: the loader's processes, or the device that trains, for the whole batch at "
        "once; the same masks", free=True, choices=("loader", "device"),
    )  # fmt: skip
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0),
        "least and largest area of the random crop, as a share of the image",
        above=0,
        at_most=1,
        group="augmentation",
    )
    tokenizer_interpolation: str = option(
        "bicubic", "what resizes the crop for the tokenizer", choices=("bicubic", "lanczos")
    )
    color_jitter: float = option(
        0.4, "brightness, contrast and saturation of both views change by up to this share, alike", at_least=0
    )
    jitter_on: str = option(
        "crop", "contrast changes about the mean of the crop, with any loader, or of the whole image, as the reference "
        "does, with torchvision's", choices=("crop", "image"),
    )  # fmt: skip
    knn_data: Path | None = option(
        None, "labeled images (FOLDER/train/CLASS and FOLDER/val/CLASS, or test) on which k nearest neighbors tell "
        "during the training how good the student's features are; none: nothing does", free=True, group="evaluation",
    )  # fmt: skip
    knn_every: int = option(10, "epochs between these; the last is always told", free=True, at_least=1)

    def implied(self, preset: PretrainConfig) -> dict[str, Any]:
        """The layer at its share of the depth, the masked patches at theirs of the image."""
        patches, before = ((c.image_size // c.patch_size) ** 2 for c in (self, preset))
        values = {"early_layer": preset.early_layer * self.depth / preset.depth}
        values |= {name: getattr(preset, name) * patches / before for name in ("num_masked", "min_mask_patches")}
        return {name: max(round(value), 1) for name, value in values.items()}
