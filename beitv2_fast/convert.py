"""The names of the published BEiT v2 checkpoints in terms of this package's: a table, read in one direction here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .quantizer import PUBLISHED_NAMES, PUBLISHED_UNUSED

# published name -> ours; every other parameter has the same name in both
TOKENIZER_NAMES = {f"quantize.{name}": f"quantize.{ours}" for name, ours in PUBLISHED_NAMES.items()}
# statistics that the reference stores and never reads again, and tables that follow from the shape
UNUSED = (*(f"quantize.{name}" for name in PUBLISHED_UNUSED), "relative_position_index")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published tokenizer, pre-trained or fine-tuned model -> state dict of ours."""
    result = {TOKENIZER_NAMES.get(name, name): value for name, value in state.items() if not name.endswith(UNUSED)}
    if "quantize.initialized" in result:
        result["quantize.initialized"] = result["quantize.initialized"].to(torch.bool).reshape(())
        result["quantize.idle"] = torch.zeros(len(result["quantize.codebook"]), dtype=torch.int64)
        result["quantize.steps"] = torch.zeros((), dtype=torch.int64)
    return result
