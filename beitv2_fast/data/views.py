"""The views of a photograph that the trainings see: random crops for the tokenizer and for fine-tuning, pairs with a
mask for the student, centers for evaluation.

A view has three parts, so that both loaders, PIL with torchvision and DALI, make the same of an image: ``draw`` makes
all random decisions of a batch; the loader cuts the ``pictures`` out of the images; ``finish`` makes tensors of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ..errors import require
from ..models.vit import IMAGENET_MEAN, normalize
from .draws import AUGMENT, Draws, jitter_steps, mask_keys, patch_masks, random_crops, random_flips, uniforms

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
Pictures = dict[str, Tensor]  # uint8 [B, size, size, 3], in whatever order they lie
LUMA = (0.299, 0.587, 0.114)
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
BRIGHTNESS, CONTRAST, SATURATION = range(3)


@dataclass(frozen=True)
class Cut:
    """A square to be cut out of an image: its side in pixels and the filter that resizes it."""

    size: int
    resample: str = "bicubic"


class View:
    """Makes named tensors of images; by default of one square picture, "image".

    resizes_first: the whole image is resized before the box is cut out of it; else the box, before it is resized.
    """

    size: int
    resizes_first = False

    @property
    def augments(self) -> bool:
        """Whether ``augment`` does something, which takes PIL images."""
        return False

    @property
    def needs_pil(self) -> str:
        """The option, if there is one, for which a loader has to have the whole images in PIL."""
        return ""

    def __call__(self, image: Image.Image, key: int = 0) -> dict[str, Tensor]:
        """The view of one image as the key, 64 random bits, wants it."""
        draws = self.draw(np.array([image.size]), np.array([key % 2**64], dtype=np.uint64))
        return {name: value[0] for name, value in self.finish(cut_out([image], self, draws), draws).items()}

    @property
    def pictures(self) -> dict[str, Cut]:
        return {"image": Cut(self.size)}

    def draw(self, sizes: np.ndarray, keys: np.ndarray) -> Draws:
        """The random decisions for images of sizes [B, 2] (width, height) with keys [B] uint64, and the view's own:

        "box" [B, 4], left, top, right and bottom in pixels of what is cut out; "flip" [B], whether the left becomes the
        right; if ``resizes_first``, "resized" [B, 2], width and height of the resized image.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method draw: what is random about its images.")

    def before_cutting(self, image: Image.Image, draws: Draws, i: int) -> Image.Image:
        """What happens to image i of the batch before anything is cut out of it; only PIL's loader knows it whole."""
        return image

    def augment(self, image: Image.Image, draws: Draws, i: int) -> Image.Image:
        """What else happens to picture i of the batch once it is resized and flipped."""
        return image

    def finish(self, pictures: Pictures, draws: Draws | dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors [B, ...] on the pictures' device, where the draws may lie, too."""
        return {"image": to_float(pictures["image"])}


@dataclass(frozen=True)
class TokenizerView(View):
    """A random crop, flipped in half of the cases: {"image": float32 [3, size, size] in [0, 1]}.

    The crop covers a share of the image's area uniform in ``crop_scale``, with an aspect ratio log-uniform in
    [3/4, 4/3], and is resized bicubically (arXiv 2208.06366, appendix: VQ-KD's hyperparameters).
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self) -> None:
        _check_view(self.size, self.crop_scale)

    def draw(self, sizes: np.ndarray, keys: np.ndarray) -> Draws:
        return {"box": random_crops(sizes, self.crop_scale, keys), "flip": random_flips(keys)}


@dataclass(frozen=True)
class PretrainView(View):
    """One crop and flip seen twice, and the student's mask:

    {"student": float32 [3, student_size, student_size], colors jittered, normalized by ImageNet's mean and deviation;
     "tokenizer": float32 [3, tokenizer_size, tokenizer_size] in [0, 1], with the same jitter;
     "mask": bool [H*W], True where the student does not see the patch}.

    Args:
        student_size, tokenizer_size: sides in pixels.
        mask_grid: (H, W), patches of the student's view in rows and columns.
        num_masked: patches to mask (75 of 14x14 in the paper, arXiv 2208.06366, section 3.2).
        min_mask_patches: the least area of a block. max_mask_patches: the most new patches it may mask; None: any.
        crop_scale: the range of the crop's share of the image's area.
        color_jitter: how far brightness, contrast and saturation may be scaled: factors in [1 - j, 1 + j].
        jitter_on: "crop": contrast is scaled about the crop's mean, so that a loader need not decode more; "image":
            about the whole image's, as the reference does, which takes PIL images.
        mask_kind: "block", or "random" for single patches.
        masks: "loader", or "device": instead of "mask" there is "mask_key", int64, of which ``patch_masks`` makes the
            same masks wherever the keys lie.
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
    masks: str = "loader"
    tokenizer_resample: str = "bicubic"
    max_mask_patches: int | None = None
    jitter_on: str = "crop"

    def __post_init__(self) -> None:
        _check_view(self.student_size, self.crop_scale)
        _check_view(self.tokenizer_size, self.crop_scale)
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter is {self.color_jitter}; expected 0 (none) to 1")
        if self.mask_kind not in ("block", "random"):
            raise ValueError(f"mask_kind is {self.mask_kind!r}; expected 'block' or 'random'")
        if self.masks not in ("loader", "device"):
            raise ValueError(f"masks is {self.masks!r}; expected 'loader' or 'device'")
        if self.tokenizer_resample not in RESAMPLING:
            raise ValueError(f"tokenizer_resample is {self.tokenizer_resample!r}; expected one of {sorted(RESAMPLING)}")
        if self.jitter_on not in ("crop", "image"):
            raise ValueError(f"jitter_on is {self.jitter_on!r}; expected 'crop' or 'image'")
        self._masks(np.zeros(1, np.int64))

    @property
    def needs_pil(self) -> str:
        return "--jitter-on image" if self.jitter_on == "image" else ""

    def before_cutting(self, image: Image.Image, draws: Draws, i: int) -> Image.Image:
        if self.jitter_on == "crop" or "jitter_step" not in draws:
            return image
        return enhanced(image.convert("RGB"), draws["jitter_step"][i].tolist(), draws["jitter_factor"][i].tolist())

    @property
    def pictures(self) -> dict[str, Cut]:
        student, tokenizer = Cut(self.student_size), Cut(self.tokenizer_size, self.tokenizer_resample)
        return {"student": student} if student == tokenizer else {"student": student, "tokenizer": tokenizer}

    def draw(self, sizes: np.ndarray, keys: np.ndarray) -> Draws:
        draws = {"box": random_crops(sizes, self.crop_scale, keys), "flip": random_flips(keys)}
        key = mask_keys(keys)
        mask = {"mask": self._masks(key)} if self.masks == "loader" else {"mask_key": key}
        return {**draws, **jitter_steps(keys, self.color_jitter), **mask}

    def finish(self, pictures: Pictures, draws: Draws | dict[str, Tensor]) -> dict[str, Tensor]:
        if "jitter_step" in draws and self.jitter_on == "crop":
            jitter = draws["jitter_step"], draws["jitter_factor"]
            pictures = {name: color_jitter(pixels, *jitter) for name, pixels in pictures.items()}
        student = to_float(pictures["student"])
        tokenizer = to_float(pictures["tokenizer"]) if "tokenizer" in pictures else student
        name = "mask" if self.masks == "loader" else "mask_key"
        mask = torch.as_tensor(draws[name]).to(student.device, non_blocking=True)
        return {"student": normalize(student), "tokenizer": tokenizer, name: mask}

    def _masks(self, keys: np.ndarray) -> np.ndarray:
        settings = (self.mask_kind, self.mask_grid, self.num_masked, self.min_mask_patches, self.max_mask_patches)
        return patch_masks(torch.from_numpy(keys), *settings).numpy()


@dataclass(frozen=True)
class FinetuneView(View):
    """A random crop, flipped in half of the cases, with RandAugment: {"image": float32 [3, size, size] in [0, 1]}.

    Erasing, mixup and cutmix come after it and for the whole batch: ``beitv2_fast.downstream.augment.BatchAugment``.

    Args:
        ops, magnitude: RandAugment's number of operations and their strength, 0 .. 30 (arXiv 1909.13719); 0 ops: none.
            By torchvision, on any loader.
        policy: instead of those two, one of timm's, as the reference's "rand-m9-mstd0.5-inc1": 2 operations, each in
            half of the cases, of strength 9 of 10, varied a little, bicubic, what comes in from outside the mean color.
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    ops: int = 2
    magnitude: int = 9
    policy: str = "none"
    _made: list = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_view(self.size, self.crop_scale)
        if self.ops < 0 or not 0 <= self.magnitude <= 30:
            raise ValueError(
                f"RandAugment of {self.ops} operations of magnitude {self.magnitude}; expected at least 0 operations "
                "of magnitude 0 to 30"
            )
        if self.policy != "none":
            timm_policy(self.policy, self.size)  # now, not in the middle of an epoch

    def draw(self, sizes: np.ndarray, keys: np.ndarray) -> Draws:
        draws = {"box": random_crops(sizes, self.crop_scale, keys), "flip": random_flips(keys)}
        if self.ops:
            u = uniforms(keys, AUGMENT, 2 * self.ops)
            draws["augment_op"] = u[:, : self.ops]
            draws["augment_sign"] = (u[:, self.ops :] < 0.5).astype(np.int32)
        return draws

    @property
    def needs_pil(self) -> str:
        return f"--augment-policy {self.policy}" if self.policy != "none" else ""

    @property
    def augments(self) -> bool:
        return self.ops > 0

    def augment(self, image: Image.Image, draws: Draws, i: int) -> Image.Image:
        if not self.ops:
            return image
        if not self._made:
            self._made.append(self._transform())
        seed = int(draws["augment_op"][i, 0] * 2**53)
        with torch.random.fork_rng(devices=[]), seeded(seed):  # torchvision draws from torch's own generator
            torch.manual_seed(seed)
            return self._made[0](image)

    def _transform(self) -> Callable[[Image.Image], Image.Image]:
        if self.policy != "none":
            return timm_policy(self.policy, self.size)
        from torchvision.transforms.v2 import InterpolationMode, RandAugment

        return RandAugment(self.ops, self.magnitude, interpolation=InterpolationMode.BILINEAR, fill=128)


def timm_policy(policy: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment, as its create_transform sets it up for images of this size, with ImageNet's mean.

    Raises:
        UserError: timm is not installed. ValueError: it does not know the policy.
    """
    library = require("timm.data.auto_augment", "teachers", "RandAugment by a policy (or choose --augment-policy none)")
    mean = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
    settings = {"translate_const": int(size * 0.45), "img_mean": mean, "interpolation": RESAMPLING["bicubic"]}
    try:
        transform = library.rand_augment_transform(policy, settings)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"augment_policy is {policy!r}; expected one of timm's, as rand-m9-mstd0.5-inc1") from error
    for op in transform.ops:
        if op.aug_fn is library.posterize:
            op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's strongest one keeps no bit, which Pillow refuses from 13 on; before, that was black."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's generators, from which timm draws, start at this seed and are put back."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass(frozen=True)
class EvalView(View):
    """The center of the image: {"image": float32 [3, size, size] in [0, 1]}, the same at every call.

    The shorter side is resized to size / crop_pct bicubically, the longer one in proportion, and the middle is cut out.
    """

    size: int
    crop_pct: float = 0.875
    resizes_first = True

    def __post_init__(self) -> None:
        _check_view(self.size, (self.crop_pct, 1.0))

    def draw(self, sizes: np.ndarray, keys: np.ndarray) -> Draws:
        short, side = sizes.min(1, keepdims=True), int(self.size / self.crop_pct)
        resized = side * sizes // short  # of the whole image, as torchvision rounds it
        first = np.rint((resized - self.size) / 2).astype(np.int64)
        box = np.concatenate([first, first + self.size], 1)
        return {"box": box, "resized": resized, "flip": np.zeros(len(sizes), bool)}


def cut_out(images: list[Image.Image], view: View, draws: Draws) -> Pictures:
    """The view's pictures of PIL images (mode "RGB" or "L")."""
    images = [view.before_cutting(image, draws, i) for i, image in enumerate(images)]
    if not view.resizes_first:
        images = [image.crop(box) for image, box in zip(images, draws["box"].tolist(), strict=True)]
    return resized_cuts(images, view, draws)


def resized_cuts(cuts: list[Image.Image], view: View, draws: Draws) -> Pictures:
    """The view's pictures of what the boxes cut out, or of whole images if it resizes first."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in view.pictures}
    for i, image in enumerate(cuts):
        for name, picture in view.pictures.items():
            if view.resizes_first:
                cut = image.resize(draws["resized"][i].tolist(), RESAMPLING[picture.resample])
                cut = cut.crop(draws["box"][i].tolist())
            else:
                cut = image.resize((picture.size, picture.size), RESAMPLING[picture.resample])
            if draws["flip"][i]:
                cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found[name].append(np.asarray(view.augment(cut.convert("RGB"), draws, i)))
    return {name: torch.from_numpy(np.stack(pixels)) for name, pixels in found.items()}


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _check_view(size: int, crop_scale: tuple[float, float]) -> None:
    if size < 1:
        raise ValueError(f"the view's size is {size} pixels; expected at least 1")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"the share of the image to crop is {crop_scale}; expected numbers in (0, 1], the lower first")


def color_jitter(pixels: Tensor, steps: np.ndarray | Tensor, factors: np.ndarray | Tensor) -> Tensor:
    """Scales brightness, contrast and saturation of each image by its factors, in its order, as PIL's enhancers (and so
    torchvision and the reference) do.

    With f the factor, truncated to whole levels after each step: brightness f*x; contrast m + f*(x - m), m the mean
    luma of the image; saturation g + f*(x - g), g the luma of each pixel.

    Args:
        pixels: uint8 [B, H, W, 3]. steps: ints [B, S], 0 brightness, 1 contrast, 2 saturation. factors: floats [B, S].

    Returns:
        a new tensor like ``pixels``. By PIL on the CPU, where it is twice as fast; by torch elsewhere, within a level
        of it for each step.
    """
    if pixels.device.type != "cpu":
        return jitter_batched(pixels, steps, factors)
    jittered = []
    for image, kinds, values in zip(pixels.numpy(), steps.tolist(), factors.tolist(), strict=True):
        jittered.append(np.asarray(enhanced(Image.fromarray(image), kinds, values)))
    return torch.from_numpy(np.stack(jittered))


def enhanced(image: Image.Image, steps: list[int], factors: list[float]) -> Image.Image:
    """``color_jitter`` of one PIL image."""
    for step, factor in zip(steps, factors, strict=True):
        image = ENHANCERS[step](image).enhance(factor)
    return image


def jitter_batched(pixels: Tensor, steps: np.ndarray | Tensor, factors: np.ndarray | Tensor) -> Tensor:
    """``color_jitter`` in torch ops: every step is x <- base + f*(x - base), with base 0, m or g."""
    x = pixels.float()
    kinds = torch.as_tensor(steps).to(x.device, non_blocking=True)
    values = torch.as_tensor(factors, dtype=torch.float32).to(x.device, non_blocking=True)
    for step in range(steps.shape[1]):
        kind, factor = (a[:, step, None, None, None] for a in (kinds, values))  # [B, 1, 1, 1]
        luma = (x[..., :1] * LUMA[0]).add_(x[..., 1:2], alpha=LUMA[1]).add_(x[..., 2:], alpha=LUMA[2]).round_()
        base = torch.where(kind == CONTRAST, luma.mean((1, 2, 3), keepdim=True).round_(), luma)
        base.masked_fill_(kind == BRIGHTNESS, 0)
        x = (x - base).mul_(factor).add_(base).floor_().clamp_(0, 255)
    return x.to(torch.uint8)
