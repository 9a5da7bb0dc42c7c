"""The views of a photograph that the trainings see: random crops for the tokenizer, pairs with a mask for the student,
centre crops for evaluation. Each view is a function of an image and a random generator, and of nothing else.

Crop and resize are one PIL call on the 8-bit image (`resize(box=...)`); a grey image stays one channel until the end.
"""

import math
import random
from dataclasses import dataclass
from typing import Protocol

import torch

from .images import Image
from .masking import block_mask, random_mask

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
LUMA = (0.299, 0.587, 0.114)
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class View(Protocol):
    """Makes named tensors of an image (8 bits a channel, mode "RGB" or "L")."""

    def __call__(self, image: Image.Image, generator: random.Random) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class TokenizerView:
    """A random crop, flipped in half of the cases: {"image": float32 [3, size, size] in [0, 1]}.

    The crop covers a share of the image's area uniform in `crop_scale`, with an aspect ratio log-uniform in
    [3/4, 4/3], and is resized bicubically (arXiv 2208.06366, appendix: VQ-KD's hyperparameters).
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self) -> None:
        _check_view(self.size, self.crop_scale)

    def __call__(self, image: Image.Image, generator: random.Random) -> dict[str, torch.Tensor]:
        box, flip = random_crop(image.size, self.crop_scale, generator), generator.random() < 0.5
        return {"image": _three_channels(_resized(image, box, self.size, flip))}


@dataclass(frozen=True)
class PretrainView:
    """One crop and flip seen twice, and the student's mask:

    {"student": float32 [3, student_size, student_size], colours jittered, normalised by ImageNet's mean and deviation;
     "tokenizer": float32 [3, tokenizer_size, tokenizer_size] in [0, 1], colours as they are;
     "mask": bool [H*W], True where the student does not see the patch}.

    Args:
        student_size, tokenizer_size: sides in pixels.
        mask_grid: (H, W), patches of the student's view in rows and columns.
        num_masked: patches to mask (75 of 14x14 in the paper, arXiv 2208.06366, section 3.2).
        min_mask_patches: the least area of a block.
        crop_scale: the range of the crop's share of the image's area.
        color_jitter: how far brightness, contrast and saturation may be scaled: factors in [1 - j, 1 + j].
        mask_kind: "block", or "random" for single patches.
        tokenizer_resample: "bicubic" or "lanczos".
    """

    student_size: int
    tokenizer_size: int
    mask_grid: tuple[int, int]
    num_masked: int
    min_mask_patches: int = 16
    crop_scale: tuple[float, float] = (0.2, 1.0)
    color_jitter: float = 0.4
    mask_kind: str = "block"
    tokenizer_resample: str = "bicubic"

    def __post_init__(self) -> None:
        _check_view(self.student_size, self.crop_scale)
        _check_view(self.tokenizer_size, self.crop_scale)
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter is {self.color_jitter}; expected 0 (none) to 1")
        if self.mask_kind not in ("block", "random"):
            raise ValueError(f"mask_kind is {self.mask_kind!r}; expected 'block' or 'random'")
        if self.tokenizer_resample not in RESAMPLING:
            raise ValueError(f"tokenizer_resample is {self.tokenizer_resample!r}; expected one of {sorted(RESAMPLING)}")
        self._mask(random.Random(0))

    def __call__(self, image: Image.Image, generator: random.Random) -> dict[str, torch.Tensor]:
        box, flip = random_crop(image.size, self.crop_scale, generator), generator.random() < 0.5
        student = _resized(image, box, self.student_size, flip)
        if (self.tokenizer_size, self.tokenizer_resample) == (self.student_size, "bicubic"):
            tokenizer = student
        else:
            tokenizer = _resized(image, box, self.tokenizer_size, flip, self.tokenizer_resample)
        return {
            "student": normalise(color_jitter(student, self.color_jitter, generator)),
            "tokenizer": _three_channels(tokenizer),
            "mask": self._mask(generator).flatten(),
        }

    def _mask(self, generator: random.Random) -> torch.Tensor:
        if self.mask_kind == "random":
            return random_mask(self.mask_grid, self.num_masked, generator)
        return block_mask(self.mask_grid, self.num_masked, generator, min_patches=self.min_mask_patches)


@dataclass(frozen=True)
class EvalView:
    """The centre of the image: {"image": float32 [3, size, size] in [0, 1]}, the same at every call.

    As if the shorter side were resized to size / crop_pct and the middle cut out, in one bicubic resize.
    """

    size: int
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        _check_view(self.size, (self.crop_pct, 1.0))

    def __call__(self, image: Image.Image, generator: random.Random | None = None) -> dict[str, torch.Tensor]:
        width, height = image.size
        side = min(width, height) * self.crop_pct
        left, top = (width - side) / 2, (height - side) / 2
        return {"image": _three_channels(_resized(image, (left, top, left + side, top + side), self.size, flip=False))}


def random_crop(size: tuple[int, int], scale: tuple[float, float], generator: random.Random) -> Box:
    """Draws a crop of an image of size (width, height): area uniform in `scale` times the image's, aspect ratio
    log-uniform in [3/4, 4/3], place uniform. If ten of them do not fit, the largest centre crop of allowed ratio."""
    width, height = size
    log_low, log_high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    low, high = CROP_RATIO
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: torch.Tensor, strength: float, generator: random.Random) -> torch.Tensor:
    """Scales brightness, contrast and saturation, in random order, by factors uniform in [1 - strength, 1 + strength].

    With f the factor and clamping to [0, 1] after each: brightness f*x; contrast m + f*(x - m), m the mean luma of the
    image; saturation g + f*(x - g), g the luma of each pixel. A grey image has no saturation to change.

    Args:
        image: float32 [C, H, W] in [0, 1], C = 3 or 1 (grey).

    Returns:
        a new tensor of the same shape; `image` itself if strength is 0.
    """
    if strength == 0:
        return image
    steps = [_brightness, _contrast, _saturation]
    generator.shuffle(steps)
    for step in steps:
        image = step(image, generator.uniform(1 - strength, 1 + strength))
    return image


def _brightness(image: torch.Tensor, factor: float) -> torch.Tensor:
    return image.mul(factor).clamp_(0, 1)


def _contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    return image.mul(factor).add_(_luma(image).mean() * (1 - factor)).clamp_(0, 1)


def _saturation(image: torch.Tensor, factor: float) -> torch.Tensor:
    if image.shape[0] == 1:
        return image
    return image.mul(factor).add_(_luma(image) * (1 - factor)).clamp_(0, 1)


def _luma(image: torch.Tensor) -> torch.Tensor:
    """[3, H, W] -> [1, H, W]; a grey image is its own luma."""
    if image.shape[0] == 1:
        return image
    red, green, blue = LUMA
    return (image[0] * red + image[1] * green + image[2] * blue).unsqueeze(0)


def normalise(
    image: torch.Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> torch.Tensor:
    """(image - mean) / std by channel: [..., 3 or 1, H, W] in [0, 1] -> [..., 3, H, W]."""
    mean_, std_ = (image.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (image - mean_) / std_


def _resized(image: Image.Image, box: Box, size: int, flip: bool, resample: str = "bicubic") -> torch.Tensor:
    """Cuts out `box`, resizes it, mirrors it if wanted. -> float32 [3, size, size] in [0, 1], or [1, ...] if grey"""
    image = image.resize((size, size), RESAMPLING[resample], box=box)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, -1)  # [H, W, C]
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _three_channels(image: torch.Tensor) -> torch.Tensor:
    return image if image.shape[0] == 3 else image.expand(3, -1, -1).contiguous()


def _check_view(size: int, crop_scale: tuple[float, float]) -> None:
    if size < 1:
        raise ValueError(f"the view's size is {size} pixels; expected at least 1")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"the share of the image to crop is {crop_scale}; expected numbers in (0, 1], the lower first")
