"""States of quantizers that are not quite the one they are loaded into: published ones, and those of other options."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .quantizer import FusedVectorQuantizer

# names of the reference implementation's quantizer -> ours
NAMES = {"embedding.weight": "codebook", "embedding.initted": "initialized", "cluster_size": "cluster_size"}
# statistics that the reference stores and never reads again
UNUSED = ("embedding.cluster_size", "embedding.embed_avg")
NOT_UNIT = 2.0**-9  # a length further from 1 is no rounding, of bf16 either


def rename_published(state: dict[str, Tensor], prefix: str) -> None:
    """Give the entries under ``prefix`` the names of FusedVectorQuantizer, in place, if they have the reference's."""
    if prefix + "embedding.weight" not in state:
        return
    for name in UNUSED:
        state.pop(prefix + name, None)
    for name, ours in NAMES.items():
        if prefix + name in state:
            value = state.pop(prefix + name)
            state[prefix + ours] = value.to(torch.bool).reshape(()) if ours == "initialized" else value


def fit_options(quantizer: FusedVectorQuantizer, state: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
    """Make the entries under ``prefix`` those of the quantizer's own options, in place, and warn of what is new.

    What other options did not keep starts as it would start beside this codebook; what they kept besides is left out.
    """
    if prefix + "codebook" not in state:
        return
    own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    news = []
    if not _fit_heads(quantizer, own, news):
        errors.append(
            f"{prefix}codebook is {list(own['codebook'].shape)} in the state dict, for a quantizer of num_codes="
            f"{quantizer.num_codes}, dim={quantizer.dim}, heads={quantizer.options.heads}, share_codebook="
            f"{quantizer.options.share_codebook}. Build it with the options that the codebook was trained with."
        )
        return
    codebook = own["codebook"]
    counts = codebook.new_zeros(codebook.shape[:-1], dtype=torch.int64)
    own.setdefault("initialized", torch.ones_like(counts.view(-1)[0], dtype=torch.bool))
    unit = not quantizer.has_unit_codes or codebook.is_meta or not own["initialized"].any()
    if not unit and (codebook.float().norm(dim=-1) - 1).abs().max() > NOT_UNIT:
        codebook = own["codebook"] = F.normalize(codebook.float(), dim=-1)
        news.append("the codes, which have other lengths (as with learning='gradient'), are normalised")
    own.setdefault("cluster_size", counts.float())
    own.setdefault("idle", counts)
    own.setdefault("steps", torch.zeros_like(counts.view(-1)[0]))
    if quantizer.embed_avg is not None and "embed_avg" not in own:
        own["cluster_size"] = own["cluster_size"].clamp(min=1)
        own["embed_avg"] = codebook.float() * own["cluster_size"][..., None]
        news.append("the moving averages of learning='sum_ema' start at this codebook")
    if quantizer.recent is not None and "recent" not in own:
        own["recent"] = counts.clone()  # loaded with assign=True, it is a buffer of its own
        news.append("the counts of restart_below start at 0")
    for name in ("embed_avg", "recent"):
        if getattr(quantizer, name) is None and own.pop(name, None) is not None:
            del state[prefix + name]
            news.append(f"{name} is left out, which these options do not use")
    state.update({prefix + name: value for name, value in own.items()})
    if news:
        where = f"{prefix}{type(quantizer).__name__}"
        warnings.warn(f"{where}: the state dict is of a quantizer with other options: {'; '.join(news)}.", stacklevel=2)


def _fit_heads(quantizer: FusedVectorQuantizer, own: dict[str, Tensor], news: list[str]) -> bool:
    """Whether the codebook has this quantizer's shape; one codebook for all heads becomes one for each."""
    groups, shape = quantizer.groups, (quantizer.num_codes, quantizer.code_dim)
    if groups == 1 or own["codebook"].shape != shape:
        return own["codebook"].shape == (shape if groups == 1 else (groups, *shape))
    for name in ("codebook", "cluster_size", "embed_avg", "idle", "recent"):
        if name in own:  # each head has its share of what was summed over all of them
            value = own[name] / groups if name in ("cluster_size", "embed_avg") else own[name]
            own[name] = value.expand(groups, *value.shape).contiguous()
    news.append(f"the one codebook becomes that of each of the {groups} heads")
    return True
