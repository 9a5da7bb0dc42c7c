"""The reference implementation's names for a quantizer's state, as published tokenizers store it."""

from __future__ import annotations

import torch
from torch import Tensor

# names of the reference implementation's quantizer -> ours
NAMES = {"embedding.weight": "codebook", "embedding.initted": "initialized", "cluster_size": "cluster_size"}
# statistics that the reference stores and never reads again
UNUSED = ("embedding.cluster_size", "embedding.embed_avg")


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
