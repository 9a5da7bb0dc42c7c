"""How good a tokenizer is on images that it was not trained with: codes in use, and similarity to its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import RunConfig, option
from .teachers import Teacher
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerQualityConfig(RunConfig):
    """Codebook usage and reconstruction similarity of a trained tokenizer (arXiv 2208.06366 section 3.4, table 6)."""

    out: Path = option(Path("runs/tokenizer_quality"), "run folder for results.json and the log")
    run: Path = option(Path("runs/tokenizer"), "run folder of the tokenizer", holds="start")
    data: Path = option(Path("data"), "folder of images; FOLDER/test or FOLDER/val is used if there is one")
    max_images: int = option(5000, "at most so many images, evenly spread over the list", at_least=1)
    batch_size: int = option(64, "images a forward", free=True, at_least=1)


PRESETS = {"base": TokenizerQualityConfig()}


@torch.no_grad()
def tokenizer_quality(model: Tokenizer, teacher: Teacher, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Looks at whole images once, in eval mode.

    Args:
        batches: images [B, 3, S, S] in [0, 1], as large as the teacher reads them; the tokenizer sees them at its size.

    Returns:
        similarity: mean cosine of the reconstruction and the teacher's feature of a patch; used_codes: share of the
        codebook that some patch chose; perplexity: exp of the entropy of the codes' frequencies; codes, images.
    """
    model.eval()
    size, codes = model.config.encoder.image_size, model.config.num_codes
    counts = torch.zeros(codes, dtype=torch.int64)
    similar, images = 0.0, 0
    for batch in batches:
        x = batch
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        out = model(x, teacher(batch, model.grid))
        similar += (1 - out.rec_loss.item()) * len(batch)
        counts += torch.bincount(out.indices.flatten().cpu(), minlength=codes)
        images += len(batch)
    shares = counts[counts > 0].double() / counts.sum()
    return {
        "similarity": similar / images,
        "used_codes": (counts > 0).double().mean().item(),
        "perplexity": (-(shares * shares.log()).sum()).exp().item(),
        "codes": codes,
        "images": images,
    }
