"""What the student expects at hidden patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.training import PretrainConfig
from ..data.images import ImageFolder
from ..data.loaders import eval_loader
from ..data.views import PretrainView
from ..errors import require
from ..models.student import BRANCHES, Student
from ..models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Guesses:
    """The student's guesses of hidden codes, on crops and masks like those of its training.

    masks: [images, N] bool. codes: the tokenizer's, [images, N] int64. guesses: the last layer's first ones, for every
    patch. right: by branch, the shares of hidden patches whose code is the first guess, and among the first five.
    """

    masks: Tensor
    codes: Tensor
    guesses: Tensor
    right: dict[str, tuple[float, float]]


def pretrain_view(config: PretrainConfig, student_size: int, tokenizer_size: int) -> PretrainView:
    """The crops, flips and masks of a pre-training, without color jitter; the sizes change nothing about them."""
    side = config.image_size // config.patch_size
    return PretrainView(
        student_size=student_size,
        tokenizer_size=tokenizer_size,
        mask_grid=(side, side),
        num_masked=config.num_masked,
        min_mask_patches=config.min_mask_patches,
        max_mask_patches=config.max_mask_patches,
        crop_scale=config.crop_scale,
        color_jitter=0.0,
        mask_kind=config.mask,
    )


@torch.inference_mode()
def guess_hidden(
    student: Student,
    tokenizer: Tokenizer,
    dataset: ImageFolder,
    device: torch.device,
    batch: int,
    workers: int,
) -> Guesses:
    """dataset: images with a ``pretrain_view``."""
    tqdm = require("tqdm", "train", "A progress bar").tqdm
    masks: list[Tensor] = []
    codes: list[Tensor] = []
    guesses: list[Tensor] = []
    hits = []  # by batch [branches, 2, hidden patches]
    loader = eval_loader(dataset, batch, workers)
    for found in tqdm(loader, desc="report: hidden patches", unit="batch", dynamic_ncols=True, disable=None):
        mask, true = found["mask"], tokenizer.encode(found["tokenizer"].to(device)).cpu()
        logits = [x.cpu() for x in student.predict(found["student"].to(device), mask.to(device))]
        best = [x[mask].topk(min(5, x.shape[-1]), dim=-1).indices == true[mask][:, None] for x in logits]
        hits.append(torch.stack([torch.stack([hit[:, 0], hit.any(-1)]) for hit in best]))
        for values, value in ((masks, mask), (codes, true), (guesses, logits[0].argmax(-1))):
            values.append(value)
    shares = torch.cat(hits, dim=-1).double().mean(-1).tolist()
    right = {name: tuple(share) for name, share in zip(BRANCHES, shares, strict=False)}
    return Guesses(torch.cat(masks), torch.cat(codes), torch.cat(guesses), right)
