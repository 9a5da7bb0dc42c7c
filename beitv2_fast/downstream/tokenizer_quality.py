"""How a tokenizer is judged (arXiv 2208.06366 section 3.4, table 6): similarity to its teacher and codes in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.training import TokenizerConfig
from ..data.draws import rank_share
from ..data.find import find_split
from ..data.images import ImageFolder
from ..data.loaders import choose_loader, keyed_loader
from ..data.views import EvalView
from ..distributed import World, autocast_dtype
from ..models.tokenizer import Tokenizer
from ..quantize.states import perplexity
from ..runs.folder import RunFolder
from ..runs.logs import is_best
from ..teachers.base import Teacher
from ..training.images import checked_images


def at_size(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, S, S] in [0, 1] as a tokenizer reads them: the teacher may read a larger version."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def measure(model: nn.Module, tokenizer: Tokenizer, teacher: Teacher, images: Tensor, real: int) -> Tensor:
    """fp64 [2 + codes] of the first ``real`` images: how many they are, the sum of their similarities (mean cosine of
    what the decoder rebuilds and the teacher's features), and how many patches chose each code.

    Args:
        model: the tokenizer, wrapped for this training or not, in eval mode. images: [B, 3, S, S] in [0, 1], as
            large as the teacher reads them.
    """
    target = teacher(images, tokenizer.grid)
    out = model(at_size(images, tokenizer.config.encoder.image_size), target)
    similar = F.cosine_similarity(out.reconstruction.float(), target.float(), dim=-1).mean(1)[:real].double().sum()
    counts = torch.bincount(out.indices[:real].flatten(), minlength=tokenizer.num_codes).double()
    return torch.cat([torch.stack([similar.new_tensor(real), similar]), counts])


def summary(sums: Tensor) -> dict[str, float]:
    """Of what ``measure`` gave for all images: similarity, unused_codes (their number), used_codes (the share of the
    others), perplexity (exp of the entropy of the codes' frequencies), codes, images."""
    images, similar, counts = sums[0].item(), sums[1].item(), sums[2:]
    return {
        "similarity": similar / images,
        "unused_codes": int((counts == 0).sum()),
        "used_codes": (counts > 0).double().mean().item(),
        "perplexity": perplexity(counts).item(),
        "codes": len(counts),
        "images": int(images),
    }


class TokenizerValidation:
    """Evaluates at the ends of epochs, as the reference does: a line in the log and in evaluation.jsonl; and whether
    the similarity is the highest so far."""

    def __init__(
        self, config: TokenizerConfig, tokenizer: Tokenizer, teacher: Teacher, run: RunFolder, world: World
    ) -> None:
        self.config, self.tokenizer, self.teacher, self.run, self.world = config, tokenizer, teacher, run, world
        found = validation_images(config)
        assert found is not None
        folder, split = found
        images = checked_images(folder, split, config, run, world, min_size=config.patch_size, name="_val")
        view = EvalView(config.teacher_image_size or config.image_size)
        loader, _ = choose_loader(config.loader, images=images, view=view, device=world.device)
        self.dataset = ImageFolder(images, view, loader=loader, device=world.device)
        self.best: str | None = None  # "weights", if those just evaluated have the highest similarity so far

    def __call__(self, step: int, models: dict[str, nn.Module], progress: Callable[[], None]) -> dict[str, float]:
        """What ``summary`` says, logged. The ranks share the images, and all run as many forwards."""
        model, world = models["weights"], self.world
        own = rank_share(len(self.dataset), world.rank, world.size)
        keys = own + [(0, 0)] * (-(-len(self.dataset) // world.size) - len(own))
        sums = torch.zeros(2 + self.tokenizer.num_codes, dtype=torch.float64, device=world.device)
        amp, seen = autocast_dtype(self.config.precision, world.device), 0
        model.eval()
        try:
            for batch in keyed_loader(self.dataset, keys, self.config.batch_size, self.config.workers):
                images = batch["image"].to(world.device)
                real = max(min(len(own) - seen, len(images)), 0)  # the rest fills up this rank's last batch
                with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
                    sums += measure(model, self.tokenizer, self.teacher, images, real)
                seen += len(images)
                progress()
        finally:
            model.train()
        found = summary(world.sum(sums))
        self.run.print(
            f"validation  step {step}  similarity to the teacher {found['similarity']:.3f}  codes unused "
            f"{found['unused_codes']:,} of {found['codes']:,}  {found['images']:,} images"
        )
        self.run.metrics(step, {f"val_{name}": value for name, value in found.items()}, "evaluation.jsonl")
        better = world.first(int(is_best(self.run.path, step, found["similarity"], "val_similarity")))
        self.best = "weights" if better else None
        return found


def validation_images(config: TokenizerConfig) -> tuple[Path, str | None] | None:
    """--val, or the split val of --data; None without either."""
    if config.val is not None:
        return config.val, None
    split = find_split(config.data, "val")
    return None if split is None else (config.data, split)
