"""Weights between the published checkpoints, this package, timm (beitv2_*) and transformers (Beit*).

    theirs = convert(model.state_dict(), "timm")  # and back: convert(theirs, "beitv2_fast")

``names`` has the tables of names, ``shapes`` reads a model's config off its tensors, ``files`` reads and writes files
and folders, ``start`` makes them the start of a training.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UserError, first_few
from ..models.attention import relative_position_index
from .names import BIAS_INDEX, BIAS_TABLE, FORMATS, PUBLISHED_COUNTERS, PUBLISHED_UNUSED, SEGMENTER_HEADS
from .translate import from_ours, to_ours

__all__ = ["FORMATS", "Weights", "convert", "detect", "from_published", "kind_of"]

_log = logging.getLogger(__name__)

# what torch.compile, FSDP and activation checkpointing put into the names, at any depth
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# the entry of each kind of model whose name tells what stands before all of its names ("model.", "module.", "net.")
MODEL = re.compile(
    r"(?P<prefix>(.*?\.)??)"
    r"((beit\.)?embeddings\.patch_embeddings\.projection|encoder\.patch_embed\.proj|(?<!coder\.)patch_embed\.proj)\.weight"
)
TOKENIZER_PREFIXES = ("encoder.", "decoder.", "quantize.", "encode_task_layer.", "decode_task_layer.")


class Weights(dict):
    """A state dict, with what its format has no place for in ``extras``.

    The dict itself is what the format's class loads with ``strict=True``. ``extras`` holds the rest under our names (a
    student's aggregation branch for timm and transformers, say): ``convert`` takes them up again, so that no way there
    and back loses anything.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None, extras: Mapping[str, Tensor] | None = None):
        super().__init__(values or {})
        self.extras: dict[str, Tensor] = dict(extras or {})


def convert(state: Mapping[str, Any], target: str, source: str | None = None) -> Weights:
    """A state dict of one format -> the same weights in another: values and dtypes stay, bit by bit.

    Formats: "published" (the checkpoints of the BEiT v2 authors: tokenizers, pre-trained and fine-tuned models),
    "beitv2_fast", "timm" (``timm.models.beit.Beit``), "transformers" (files of BeitModel, BeitForMaskedImageModeling
    and BeitForImageClassification), "transformers_modules" (what their ``state_dict()`` shows in transformers 5).

    Only the first two have tokenizers; ``to_classifier`` makes a plain ViT of its encoder. Published segmenters
    (mmsegmentation's ``backbone.``, ``decode_head.``, ``auxiliary_head.``) become ours, and nothing else. timm has no
    place for a student's mask token, head and aggregation branch, transformers none for the last: ``Weights.extras``.
    The buffers ``relative_position_index`` follow from the shape of the bias table: published files get them, others
    do not hold them.

    Args:
        state: the state dict, also with the names that DDP, torch.compile, FSDP, Lightning or an average make of them
            (``module.``, ``_orig_mod.``, ``model.``, ...). Entries that are not the model's are left out, and logged.
        target: the format to make.
        source: the format of ``state``; None: recognized by its names.

    Raises:
        CheckpointError: names that the format does not have (all of them are listed), pieces that are missing, or a
            model without a counterpart. UserError: an unknown format.
    """
    for name in (target, *([source] if source else [])):
        if name not in FORMATS:
            raise UserError(f"there is no format {name!r}. Choose one of: {', '.join(FORMATS)}.")
    extras = dict(getattr(state, "extras", {}))
    entries = without_wrapping(state)
    source = source or detect(entries)
    ours, unknown = to_ours(_without_tables(_plain_names(entries, source)), source)
    unused = {name: unknown.pop(name) for name in list(unknown) if name.startswith(PUBLISHED_UNUSED)}
    heads = {name: unknown.pop(name) for name in list(unknown) if name.startswith(SEGMENTER_HEADS)}
    if heads and (target != "beitv2_fast" or source not in ("beitv2_fast", "published")):
        raise CheckpointError("only published segmenters are converted, and only to beitv2_fast.")
    if unknown:
        raise CheckpointError(
            f"these weights were read as {source!r}, which has no entries named {', '.join(unknown)}. "
            f"Name their format ({', '.join(FORMATS)}), or use the weights of a BEiT v2 model."
        )
    kind = kind_of(ours)
    if kind == "tokenizer" and target not in ("beitv2_fast", "published"):
        raise CheckpointError(
            f"{target} has no tokenizer. Convert to beitv2_fast or published, or make a classifier's weights of its "
            "encoder with beitv2_fast.weights.start.to_classifier."
        )
    if "quantize.initialized" in ours:
        ours["quantize.initialized"] = ours["quantize.initialized"].to(torch.bool).reshape(())
    result, rest = from_ours({**ours, **unused, **extras}, target)
    if target == "published":
        _complete_published(result, rest)
    elif target == "beitv2_fast" and "quantize.initialized" in result:
        codes = len(result["quantize.codebook"])
        result.setdefault("quantize.idle", torch.zeros(codes, dtype=torch.int64))
        result.setdefault("quantize.steps", torch.zeros((), dtype=torch.int64))
    return Weights({**result, **heads}, rest)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published tokenizer, pre-trained or fine-tuned model -> state dict of ours."""
    return dict(convert(state, "beitv2_fast", "published"))


def detect(state: Mapping[str, Tensor]) -> str:
    """The format of a state dict, by its names.

    Names that ours, the published checkpoints and timm share are called "published" if there are index buffers next
    to the bias tables, else "beitv2_fast".

    Raises:
        CheckpointError: they are those of no format.
    """
    state = without_wrapping(state)
    names = [name.removeprefix("beit.") for name in state]
    if any(name.startswith("embeddings.") for name in names):
        return "transformers_modules" if any(name.startswith("layers.") for name in names) else "transformers"
    if "quantize.embedding.weight" in state or any(name.endswith(BIAS_INDEX) for name in names):
        return "published"
    if "patch_embed.proj.weight" in state or any(name.startswith(TOKENIZER_PREFIXES) for name in names):
        return "beitv2_fast"
    raise CheckpointError(
        f"these are no weights of a BEiT v2 model in a known format ({', '.join(FORMATS)}): their names are "
        f"{first_few(list(state))}."
    )


def kind_of(ours: Mapping[str, Tensor]) -> str:
    """ "tokenizer", "classifier" or "student": the model whose weights these are, under our names."""
    starts = {name.split(".", 1)[0] for name in ours}
    if any(name.startswith(TOKENIZER_PREFIXES) for name in ours):
        return "tokenizer"
    if starts & {"head", "fc_norm"}:
        if "norm" in starts:
            raise CheckpointError(
                "these are the weights of a classifier that reads the CLS token (they have norm and head or fc_norm); "
                "the classifier here reads the mean of the patch tokens. Use one fine-tuned that way."
            )
        return "classifier"
    return "student"


def without_wrapping(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of the model within what was trained, under its own names; other entries are logged."""
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"a state dict of tensors is needed, but these entries are none: {', '.join(others)}")
    plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
    if any(name.startswith("decode_head.") for name in plain):  # mmsegmentation's name of the ViT beside its heads
        plain = {name.removeprefix("backbone."): value for name, value in plain.items()}
    found = [m["prefix"] for name in plain if (m := MODEL.fullmatch(name))]
    prefixes = [p for p in found if "ema" not in p.lower()] or found  # an average of the weights is not taken
    if "" in found:  # published tokenizers come with their teacher
        prefixes = [""]
    if len(prefixes) > 1:
        raise CheckpointError(f"these are the weights of several models: {', '.join(prefixes)}. Keep those of one.")
    prefix = prefixes[0] if prefixes else ""
    beside = [name for name in plain if not name.startswith(prefix)]
    if beside:
        _log.warning("entries beside %s* are left out: %s", prefix, ", ".join(beside[:8]))
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def _plain_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """transformers' variants as one: a bare BeitModel, its norm as that of the head, keys with a bias of zeros."""
    if not source.startswith("transformers"):
        return state
    if not any(name.startswith("beit.") for name in state):
        state = {f"beit.{name}": value for name, value in state.items()}
    if "layernorm.weight" not in state:
        state = {name.replace("beit.layernorm.", "layernorm."): value for name, value in state.items()}
    zero_biases = [n for n, v in state.items() if n.endswith(("key.bias", "k_proj.bias")) and not v.any()]
    return {name: value for name, value in state.items() if name not in zero_biases}


def _without_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the index buffers, once they are seen to say what the shapes of their tables say."""
    for name in [name for name in state if name.endswith(BIAS_INDEX)]:
        table = state.get(name.removesuffix(BIAS_INDEX) + BIAS_TABLE)
        index = state.pop(name)
        if table is not None and not torch.equal(index, _index(name, table)):
            raise CheckpointError(
                f"{name} {list(index.shape)} does not belong to the square grid of a bias table {list(table.shape)}: "
                "only models of square images can be converted."
            )
    return state


def _index(name: str, table: Tensor) -> Tensor:
    side = grid_side(name, table)
    return relative_position_index((side, side)).to(table.device)


def grid_side(name: str, table: Tensor) -> int:
    """g of a bias table of (2g - 1)^2 + 3 rows."""
    width = round(max(len(table) - 3, 0) ** 0.5)
    if width**2 + 3 != len(table) or width % 2 == 0:
        raise CheckpointError(
            f"{name}: a bias table of {len(table)} rows belongs to no square grid ((2g-1)^2 + 3 rows)"
        )
    return (width + 1) // 2


def _complete_published(result: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
    """Add what the reference's classes want to load: index buffers, and statistics that they never read."""
    for name in [name for name in result if name.endswith(BIAS_TABLE)]:
        result[name.removesuffix(BIAS_TABLE) + BIAS_INDEX] = _index(name, result[name])
    if "quantize.embedding.initted" in result:
        codebook = result["quantize.embedding.weight"]
        result["quantize.embedding.initted"] = result["quantize.embedding.initted"].to(torch.float32).reshape(1)
        fresh = (torch.zeros(len(codebook)), codebook.clone())
        for name, value in zip(PUBLISHED_COUNTERS, fresh, strict=True):
            result[name] = rest.pop(name, value)
    for name in [name for name in rest if name.startswith(PUBLISHED_UNUSED)]:
        result[name] = rest.pop(name)
